"""Feature distillation: the same objective and gradient at every layout and recomputation; the formula itself."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import small

STEPS = 3
LAYERS = {"features__student_layers": [1, 2], "features__teacher_layers": [1, 2], "features__weight": 0.5}


def curve(ranks, tp, pp, size, **changes):
    return run_ranks(ranks, small.curve, tp, pp, size, STEPS, LAYERS | changes)[0]


@pytest.fixture(scope="module")
def whole():
    return {distance: curve(1, 1, 1, 8, features__distance=distance) for distance in ("mse", "cosine")}


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "size", "changes"),
    [
        (1, 1, 1, 2, {}),
        (1, 1, 1, 2, {"train__recompute": "full"}),
        (2, 1, 1, 4, {"parallel__fsdp": "both", "train__recompute": "full"}),
        (2, 1, 1, 4, {"parallel__fsdp": "both", "parallel__fsdp_by": "megatron"}),
        (2, 2, 1, 4, {}),
        (2, 2, 1, 4, {"parallel__sp": True}),
        (2, 2, 1, 4, {"parallel__sp": True, "train__recompute": "full"}),
        (2, 1, 1, 4, {"parallel__cp": 2}),
        (2, 1, 2, 2, {}),
        (2, 1, 2, 2, {"train__recompute": "full"}),
        (4, 2, 1, 2, {"features__distance": "cosine"}),
    ],
)
def test_layout_and_recomputation_change_nothing(whole, ranks, tp, pp, size, changes):
    """Gradient norms are compared too: features collected under recomputation would lose theirs."""
    got = curve(ranks, tp, pp, size, **changes)
    for a, b in zip(got, whole[changes.get("features__distance", "mse")], strict=True):
        assert a == pytest.approx(b, rel=5e-5, abs=1e-6)


def test_it_is_one_more_term_that_moves_the_student(whole):
    without = run_ranks(1, small.curve, 1, 1, 8, STEPS, {})[0]
    for curve in whole.values():
        assert curve[0]["features"] > 0
        assert curve[0]["loss"] == pytest.approx(without[0]["loss"] + curve[0]["features"], rel=1e-6)
        assert curve[0]["grad_norm"] != pytest.approx(without[0]["grad_norm"], rel=1e-3)


def gradient_and_reference(rank, ranks, recompute):
    """The map's and a weight's gradient of the feature term alone, by training and by plain autograd."""
    with small.layout() as groups:
        changes = LAYERS | {"loss__kd_weight": 0.0, "loss__ce_weight": 1e-30, "optimizer__clip_grad": 0.0}
        config = small.config(**(changes | {"train__recompute": recompute}))
        run = small.student_step(config, groups)
        batch = small.batch(0, groups, 8)[0]
        run([batch], step=1, measure=False)
        names = ("feature_maps.2.weight", "decoder.layers.0.mlp.linear_fc2.weight")
        got = [dict(run.gpt.named_parameters())[name].main_grad.clone() for name in names]
        fresh = small.student_step(config, groups)
        seen = {}
        for who, gpt in (("student", fresh.gpt), ("teacher", fresh.teacher.gpt)):
            for layer in gpt.decoder.layers:
                key = (who, layer.layer_number)
                layer.register_forward_hook(lambda m, a, output, key=key: seen.__setitem__(key, output[0]))
        fresh.teacher.gpt(batch.ids_BS, batch.position_ids_BS, None)
        fresh.gpt.eval()  # the attached distances are for training only
        fresh.gpt(batch.ids_BS, batch.position_ids_BS, None)
        rows = (batch.labels_BS.T != -100).double()
        loss = 0
        for n in (1, 2):
            mapped = seen[("student", n)].double() @ fresh.gpt.feature_maps[str(n)].weight.double().T
            difference = (mapped - seen[("teacher", n)].double()).square().mean(-1)
            loss = loss + 0.5 * (difference * rows).sum() / rows.sum()
        parameters = [dict(fresh.gpt.named_parameters())[name] for name in names]
        want = torch.autograd.grad(loss, parameters)
        return [(a, b.float()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_gradient_is_that_of_the_formula(recompute):
    for got, want in run_ranks(1, gradient_and_reference, recompute)[0]:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "pp", "text"),
    [
        ({"student_layers": [3], "teacher_layers": [1]}, 1, "features.student_layers: 3, but that model has 2 layers"),
        ({"student_layers": [1], "teacher_layers": [2]}, 2, "is on pipeline stage 0, teacher layer 2 on 1"),
    ],
)
def test_layers_that_do_not_fit_are_refused(changes, pp, text):
    from megakd.config import Features, Model, check_features
    from megakd.errors import ConfigError

    config = small.config(pp=pp).model_copy(update={"features": Features.model_validate(changes)})
    models = [Model.model_validate(section()) for section in (small.student_section, small.teacher_section)]
    with pytest.raises(ConfigError, match=text):
        check_features(config, *models)


def checkpoint_keys(rank, ranks):
    with small.layout(pp=2) as groups:
        from megakd.checkpoints.torch_dist import sharding_metadata

        gpt = small.student_step(small.config(pp=2, **LAYERS), groups).gpt
        return {t.key for t in gpt.sharded_state_dict(metadata=sharding_metadata(groups)).values() if hasattr(t, "key")}


def test_the_maps_are_in_the_checkpoint_of_their_stage():
    first, last = run_ranks(2, checkpoint_keys)
    assert "feature_maps.1.weight" in first and "feature_maps.2.weight" not in first
    assert "feature_maps.2.weight" in last and "feature_maps.1.weight" not in last
