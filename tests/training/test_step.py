"""One objective and one curve, however the batch and the models are cut."""

import functools
import math

import pytest
import torch

from megakd.errors import TrainingError
from tests.ranks import run_ranks
from tests.training import small

STEPS = 3


@functools.cache
def whole(**changes):
    """The curve of one rank that takes the batch in one piece."""
    return run_ranks(1, small.curve, 1, 1, 8, STEPS, changes)[0]


def assert_same_curve(got, want, rtol=2e-5, steps=STEPS):
    assert len(got) == len(want) == steps
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=rtol, abs=1e-6), f"step {step + 1}: {name}"


def test_the_curve_moves():
    losses = [m["loss"] for m in whole()]
    assert len(set(losses)) == STEPS and all(math.isfinite(loss) for loss in losses)
    assert whole()[0]["tokens"] == 4 * small.SEQUENCE - 6 + 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batch_size_changes_nothing(size):
    assert_same_curve(run_ranks(1, small.curve, 1, 1, size, STEPS, {})[0], whole())


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "size"), [(2, 2, 1, 8), (2, 1, 1, 2), (2, 1, 2, 2), (4, 2, 1, 1), (4, 2, 2, 4)]
)
def test_layout_changes_nothing(ranks, tp, pp, size):
    """Uneven labels: at dp = 2 the first rank has one supervised token, and whole micro-batches of it have none."""
    curves = run_ranks(ranks, small.curve, tp, pp, size, STEPS, {})
    assert all(curve == curves[0] for curve in curves), "the ranks report different numbers"
    assert_same_curve(curves[0], whole())


@pytest.mark.parametrize(
    "changes", [{"parallel__sp": True}, {"train__recompute": "full"}, {"train__recompute": "selective"}]
)
def test_sequence_parallel_and_recompute_change_nothing(changes):
    assert_same_curve(run_ranks(2, small.curve, 2, 1, 4, STEPS, changes)[0], whole())


@pytest.mark.parametrize(
    ("ranks", "tp", "changes"),
    [
        (1, 1, {}),
        (2, 2, {}),
        (2, 2, {"parallel__sp": True}),
        (2, 2, {"parallel__sp": True, "train__recompute": "full"}),
    ],
)
def test_the_fused_head_changes_nothing(ranks, tp, changes):
    """7 tokens' logits at a time, in both models; 59 tokens at most are supervised."""
    budget = {"loss__logits_memory_budget_bytes": 7 * 1024 * 4 // tp}
    assert_same_curve(run_ranks(ranks, small.curve, tp, 1, 8, STEPS, budget | changes)[0], whole())


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("changes", [{}, {"parallel__sp": True}, {"parallel__sp": True, "train__recompute": "full"}])
def test_latent_attention_has_one_curve_too(changes, q_rank):
    latent = {"kv_lora_rank": 12, "q_lora_rank": q_rank, "qk_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    section = {"num_query_groups": 4, "mla": latent}
    one = run_ranks(1, small.curve, 1, 1, 8, STEPS, {}, True, section)[0]
    assert_same_curve(run_ranks(2, small.curve, 2, 1, 4, STEPS, changes, True, section)[0], one)


def test_gpt2_like_models_have_one_curve_too():
    section = {
        "normalization": "LayerNorm",
        "activation": "gelu",
        "position_embedding": "learned_absolute",
        "add_bias_linear": True,
        "num_query_groups": 4,
    }
    one = run_ranks(1, small.curve, 1, 1, 8, STEPS, {}, True, section)[0]
    assert_same_curve(run_ranks(2, small.curve, 2, 1, 2, STEPS, {}, True, section)[0], one)
    assert one[0]["loss"] != whole()[0]["loss"]


OTHER_LAYERS = {
    "OLMo-2": {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_over": "all_heads"},
    "Granite": {"residual_multiplier": 0.4, "logit_divisor": 3.0, "embedding_multiplier": 2.0},
    "Falcon": {"normalization": "LayerNorm", "parallel_residual": True, "shared_norm": True, "activation": "gelu"},
}


@pytest.mark.parametrize("changes", [{}, {"parallel__sp": True}])
@pytest.mark.parametrize("kind", OTHER_LAYERS)
def test_other_layers_have_one_curve_too(kind, changes):
    """Norms over all heads sum over the ranks that share them, forward and backward.

    Without norms before the blocks the small first weights are divided by their own size, and Adam's first steps follow
    the signs of gradients that are rounding alone: of OLMo-2 the first step is compared, loss and gradient.
    """
    section, steps = OTHER_LAYERS[kind], 1 if kind == "OLMo-2" else STEPS
    one = run_ranks(1, small.curve, 1, 1, 8, steps, {}, True, section)[0]
    assert_same_curve(run_ranks(2, small.curve, 2, 1, 4, steps, changes, True, section)[0], one, steps=steps)
    assert one[0]["loss"] != whole()[0]["loss"]


def test_bf16_follows_fp32():
    bf16 = run_ranks(2, small.curve, 2, 1, 4, STEPS, {"train__precision": "bf16"})[0]
    for a, b in zip(bf16, whole(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)


def test_a_teacher_in_bf16_beside_a_student_in_fp32():
    """It is near the one in fp32, and not it."""
    mixed = run_ranks(1, small.curve, 1, 1, 8, STEPS, {"teacher__precision": "bf16"})[0]
    for a, b in zip(mixed, whole(), strict=True):
        assert a["kd"] == pytest.approx(b["kd"], rel=0.02) and a["kd"] != b["kd"]
    assert mixed[0]["ce"] == pytest.approx(whole()[0]["ce"], rel=1e-6), "the student is in fp32"


def dense_first_loss(rank, ranks):
    """The first step's loss from Megatron's own logits and plain float64 formulas."""
    with small.layout() as groups:
        config = small.config()
        student = small.build(small.student_section(), config, groups, seed=1)
        teacher = small.build(small.teacher_section(), config, groups, seed=2)
        ids, labels = small.tokens(0)
        position = torch.arange(small.SEQUENCE).expand(len(ids), -1)
        rows = (labels != -100).flatten()
        with torch.no_grad():
            z, t = (
                model.logits(model(ids, position, None)).view(small.SEQUENCE, len(ids), -1).transpose(0, 1)
                for model in (student, teacher)
            )
        z, t = (x.flatten(0, 1)[rows][:, : small.VOCAB].double() for x in (z, t))
        log_p, log_q = (t / 2).log_softmax(-1), (z / 2).log_softmax(-1)
        top, ids_TK = log_p.topk(20)
        tail = (log_p.scatter(1, ids_TK, -torch.inf).logsumexp(1), log_q.scatter(1, ids_TK, -torch.inf).logsumexp(1))
        kd = (top.exp() * (top - log_q.gather(1, ids_TK))).sum(1) + tail[0].exp() * (tail[0] - tail[1])
        ce = torch.nn.functional.cross_entropy(z, labels.flatten()[rows], reduction="none")
        teacher_ce = torch.nn.functional.cross_entropy(t, labels.flatten()[rows])
        agreement = (z.argmax(1) == t.argmax(1)).double().mean()
        return {
            "loss": (4 * kd + 0.25 * ce).mean().item(),
            "teacher_ce": teacher_ce.item(),
            "agreement": agreement.item(),
        }


def test_the_first_loss_is_the_formula():
    want, got = run_ranks(1, dense_first_loss)[0], whole()[0]
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-5)


def step_without_labels(rank, ranks):
    with small.layout() as groups:
        run = small.student_step(small.config(), groups)
        micro_batches = small.batch(0, groups, 4)
        for micro_batch in micro_batches:
            micro_batch.labels_BS.fill_(-100)
        before = [p.clone() for p in run.gpt.parameters()]
        result = run(micro_batches, step=1, measure=True)
        unchanged = all(torch.equal(a, b) for a, b in zip(before, run.gpt.parameters(), strict=True))
        return result, unchanged


def test_a_step_without_supervised_tokens_changes_nothing():
    assert run_ranks(1, step_without_labels)[0] == (None, True)


def message_of_a_broken_step(rank, ranks, whose):
    with small.layout(tp=2) as groups:
        run = small.student_step(small.config(tp=2), groups, teacher=whose == "teacher")
        gpt = run.gpt if whose == "student" else run.teacher.gpt
        with torch.no_grad():
            gpt.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = torch.nan if rank == 1 else 0.0
        try:
            run(small.batch(0, groups, 8), step=7, measure=True)
        except TrainingError as error:
            return str(error)


def test_a_loss_that_is_not_finite_stops_every_rank():
    messages = run_ranks(2, message_of_a_broken_step, "student")
    assert messages[0] == messages[1]
    assert "step 7" in messages[0] and "nan" in messages[0] and "hint:" in messages[0]


def test_an_online_teacher_that_is_not_finite_is_named_on_every_rank():
    messages = run_ranks(2, message_of_a_broken_step, "teacher")
    assert messages[0] == messages[1]
    assert "online teacher: the teacher's logits hold NaN" in messages[0] and "hint:" in messages[0]


RAMPS = {
    "kd_weight": {"to": 0.5, "steps": 3},
    "ce_weight": {"to": 1.0, "steps": 2},
    "temperature": {"to": 1.0, "steps": 3},
}


def test_ramps_are_followed_step_by_step():
    ramped = run_ranks(2, small.curve, 2, 1, 8, STEPS, {"loss__ramps": RAMPS})[0]
    assert [m["temperature"] for m in ramped] == pytest.approx([2.0, 1.5, 1.0])
    for m in ramped:
        assert m["loss"] == pytest.approx(m["kd_weight"] * m["temperature"] ** 2 * m["kd"] + m["ce_weight"] * m["ce"])
    assert ramped[0]["kd"] == pytest.approx(whole()[0]["kd"])
    assert ramped[2]["teacher_mass"] > 1.2 * whole()[2]["teacher_mass"], "the teacher is sharper at temperature 1"


def temperatures(rank, ranks):
    with small.layout() as groups:
        ramp = {"to": 1.0, "kind": "wsd", "steps": 9, "warmup_steps": 2, "decay_steps": 2}
        run = small.student_step(small.config(loss__ramps={"temperature": ramp}), groups)
        seen = []
        for i in range(3):
            run(small.batch(i, groups, 8), step=i + 1, measure=False)
            seen.append(run.teacher.temperature)
        return seen


def test_the_teacher_leaves_the_warm_up_of_a_temperature_too():
    assert run_ranks(1, temperatures)[0] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_every_divergence_trains(divergence):
    curve = run_ranks(2, small.curve, 2, 1, 8, STEPS, {"loss__divergence": divergence})[0]
    assert curve[0]["ce"] == pytest.approx(whole()[0]["ce"]) and curve[0]["kd"] != pytest.approx(whole()[0]["kd"])
    assert all(math.isfinite(m["grad_norm"]) and m["grad_norm"] > 0 for m in curve)
