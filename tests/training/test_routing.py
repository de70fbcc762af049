"""Terms of a student's routers: the definition and its gradient, biases that move, and those that must not."""

import pytest
import torch

from megakd.config import Model, Routing
from megakd.errors import ConfigError
from tests.ranks import run_ranks
from tests.training import small

MOE = {"num_experts": 5, "top_k": 2, "ffn_hidden_size": 12, "layers": [1]}
WEIGHTS = {"routing__balance_weight": 0.3, "routing__z_loss_weight": 0.02}


def gradient_and_reference(rank, ranks, score):
    """(metrics, the router's gradient) of a step with nothing else in the objective, and both by definition."""
    with small.layout() as groups:
        nothing = {"loss__kd_weight": 0.0, "loss__ce_weight": 1e-30, "optimizer__clip_grad": 0.0}
        moe = MOE | {"score": score}
        nothing["student__model"] = small.student_section(moe=moe)
        run = small.student_step(small.config(**nothing, **WEIGHTS), groups, moe=moe)
        batch = small.batch(0, groups, 8)[0]
        metrics = run([batch], step=1, measure=False)
        name = "decoder.layers.1.mlp.router.weight"
        got = dict(run.gpt.named_parameters())[name].main_grad.clone()

        fresh = small.student_step(small.config(**nothing), groups, moe=moe).gpt.eval()
        router, seen = dict(fresh.named_modules())["decoder.layers.1.mlp.router"], []
        router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().double()))
        fresh(batch.ids_BS, batch.position_ids_BS, None)
        weight = router.weight.detach().double().requires_grad_()
        logits_SBE = seen[0] @ weight.T
        scores = logits_SBE.sigmoid() if score == "sigmoid" else logits_SBE.softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        balance = 0
        for b in range(len(batch.ids_BS)):
            of_one = scores[:, b]
            chosen = of_one.topk(2).indices.flatten()
            share = torch.stack([(chosen == e).double().mean() for e in range(5)])
            balance = balance + 5 * (share * of_one.mean(0)).sum() / len(batch.ids_BS)
        z = logits_SBE.logsumexp(-1).square().mean()
        (want,) = torch.autograd.grad(0.3 * balance + 0.02 * z, weight)
        return metrics, got, {"balance": balance.item(), "router_z": z.item()}, want.float()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_they_are_the_definition_whatever_share_of_positions_is_supervised(score):
    metrics, got, want_metrics, want = run_ranks(1, gradient_and_reference, score)[0]
    assert {name: metrics[name] for name in want_metrics} == pytest.approx(want_metrics, rel=1e-5)
    total = 0.3 * want_metrics["balance"] + 0.02 * want_metrics["router_z"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert 1 < want_metrics["balance"] < 1.5 and want.abs().max() > 1e-4
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-4)


def biases(rank, ranks):
    """Of student and teacher: at first, after a step, after one that was left out; and what the teacher counted."""
    with small.layout(ep=2) as groups:
        moe = MOE | {"num_experts": 4, "score": "sigmoid", "bias": True, "layers": None}
        section = small.student_section(moe=moe)
        config = small.config(routing__bias_update_rate=0.25, parallel__ep=2, student__model=section)
        run = small.student_step(config, groups, teacher_changes={"moe": moe}, moe=moe)
        of = {"student": run.gpt, "teacher": run.teacher.gpt}
        with torch.no_grad():
            of["teacher"].decoder.layers[0].mlp.router.expert_bias.copy_(torch.arange(4.0))
        seen = [{who: gpt.decoder.layers[0].mlp.router.expert_bias.clone() for who, gpt in of.items()}]
        from megakd.training.step import BrokenBatch

        for limit in (torch.inf, 1e-6):
            try:
                run(small.batch(0, groups, 4), step=1, measure=True, loss_limit=limit)
            except BrokenBatch:
                run.leave_out()
            seen.append({who: gpt.decoder.layers[0].mlp.router.expert_bias.clone() for who, gpt in of.items()})
        return seen, of["teacher"].decoder.layers[0].mlp.router.local_tokens_per_expert


def test_a_students_biases_follow_the_load_and_a_teachers_stay():
    (seen, counted), (other, _) = run_ranks(2, biases)
    first, after, left_out = (s["student"] for s in seen)
    assert (first == 0).all() and set(after.abs().tolist()) <= {0.0, 0.25} and after.abs().max() == 0.25
    assert torch.equal(left_out, after) and torch.equal(after, other[1]["student"])
    for s in seen:
        assert torch.equal(s["teacher"], torch.arange(4.0))
    assert (counted == 0).all()


@pytest.mark.parametrize(
    ("routing", "moe", "text"),
    [
        ({"balance_weight": 0.1}, None, "routing.balance_weight: 0.1, but the student has no experts"),
        ({"z_loss_weight": 0.1}, None, "routing.z_loss_weight: 0.1, but the student has no experts"),
        ({"bias_update_rate": 0.1}, MOE, "routing.bias_update_rate: 0.1, but the student has no moe.bias"),
    ],
)
def test_what_has_no_effect_is_refused(routing, moe, text):
    section = small.student_section(moe=moe)
    with pytest.raises(ConfigError, match=text):
        small.config(student__model=section, **{f"routing__{key}": value for key, value in routing.items()})
    assert [key for key, _ in Routing(**routing).model_problems(Model.model_validate(section))]
