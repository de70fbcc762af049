"""The gradients of a step with output layer and loss fused, and with the logits of a micro-batch kept for autograd."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import small

BUDGET = 7 * 1024 * 4  # bytes: 7 tokens' logits at tp = 1, of at most 59 supervised ones


def gradients(rank, ranks, tp, pp, fused, changes, student_changes):
    """What the optimizer is given of every parameter of this rank, and the step's metrics."""
    from megakd.training import head_loss

    found = {}
    with small.layout(tp, pp) as groups, pytest.MonkeyPatch.context() as patch:
        budget = {"loss__logits_memory_budget_bytes": BUDGET // tp}
        run = small.student_step(small.config(tp, pp, **(changes | budget)), groups, **student_changes)

        def keep():
            found.update({name: p.main_grad.detach().clone() for name, p in run.gpt.named_parameters()})
            return True, 1.0, None

        patch.setattr(run.optimizer, "step", keep)
        if not fused:
            patch.setattr(head_loss, "is_fused", lambda *_: False)
        metrics = run(small.batch(0, groups, 2)[::-1], step=1, measure=True)  # the emptiest come last
    return found, metrics


LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1)]  # ranks, tp, pp; the last one is dp 2


def compare(ranks, tp, pp, changes, student_changes):
    """Micro-batches of 2 samples: one has no supervised token at all, another one."""
    fused, apart = (run_ranks(ranks, gradients, tp, pp, f, changes, student_changes) for f in (True, False))
    for (got, got_metrics), (want, want_metrics) in zip(fused, apart, strict=True):
        assert got.keys() == want.keys() and got
        for name, want_grad in want.items():
            assert want_grad.abs().max() > 0, name
            torch.testing.assert_close(
                got[name], want_grad, rtol=1e-4, atol=2e-6 * float(want_grad.abs().max()), msg=lambda m, n=name: n + m
            )
        assert got_metrics == pytest.approx(want_metrics, rel=1e-5)


@pytest.mark.parametrize("ranks, tp, pp", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_fused_head_has_the_gradients_of_the_one_apart(ranks, tp, pp, tied):
    compare(ranks, tp, pp, {}, {"tie_embeddings": tied})


@pytest.mark.parametrize(
    "ranks, tp, changes", [(1, 1, {}), (2, 2, {"parallel__sp": True}), (2, 2, {"train__recompute": "full"})]
)
def test_soft_capped_heads_sequence_parallel_and_recompute_too(ranks, tp, changes):
    compare(ranks, tp, 1, changes, {"logit_softcap": 2.0, "init_std": 0.3})


def test_the_weight_gradient_is_summed_in_float32():
    """Four micro-batches in bfloat16: the returned gradient is rounded for each, what goes into main_grad is not."""
    bf16, name = {"train__precision": "bf16"}, "output_layer.weight"
    (truth, _), (fused, _), (apart, _) = (
        run_ranks(1, gradients, 1, 1, f, c, {"tie_embeddings": False})[0]
        for f, c in ((False, {}), (True, bf16), (False, bf16))
    )
    assert fused[name].dtype == torch.float32
    rounded = [(x[name].bfloat16() == x[name]).float().mean() for x in (fused, apart)]
    assert rounded[0] < rounded[1]
    errors = [(x[name] - truth[name]).norm() for x in (fused, apart)]
    assert errors[0] <= 1.05 * errors[1] and errors[0] < 0.05 * truth[name].norm()


def a_masked_label(rank, ranks):
    from megakd.config import Loss
    from megakd.kernels import VocabShard
    from megakd.losses import fused_objective
    from megakd.teachers.lesson import no_lesson

    shard, labels_T = VocabShard(0, 8, 8), torch.tensor([3, -100, 2])
    hidden_TH, weight_WH = torch.ones(3, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
    given = no_lesson(3, "cpu").targets, labels_T, shard, Loss(kd_weight=0.0, ce_weight=1.0)
    with pytest.raises(ValueError, match="label -100 in row 1, though all_supervised"):
        fused_objective(hidden_TH, weight_WH, *given, softcap=None, block_tokens=2)


def test_every_label_of_an_objective_is_a_token():
    """So that nothing has to ask the device which are."""
    run_ranks(1, a_masked_label)


def what_is_logged(rank, ranks):
    from types import SimpleNamespace

    from megakd.config import Loss
    from megakd.models.gpt import GPT
    from megakd.training.head_loss import describe_head

    def head(softcap=None):
        gpt = SimpleNamespace(shard=SimpleNamespace(start=0, stop=1024), logit_bytes=4, softcap=softcap)
        gpt.block_tokens = lambda budget: GPT.block_tokens(gpt, budget)
        return gpt

    small_budget, large_budget = (Loss(logits_memory_budget_bytes=b) for b in (BUDGET, 1 << 30))
    cases = (None, small_budget), (None, large_budget), (2.0, large_budget)
    return [describe_head(head(softcap), [], 9, loss).split(":")[0] for softcap, loss in cases]


def test_what_is_logged_of_the_head():
    assert run_ranks(1, what_is_logged)[0] == [
        "output layer and loss fused, 7 tokens at a time",
        "output layer and loss apart",
        "output layer and loss fused for the soft cap's sake, 9 tokens at a time",
    ]
