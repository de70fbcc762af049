"""Ramps: pure functions of the step, with the values at their ends written out."""

import pytest

from megakd.config.loss import Loss
from megakd.config.section import BrokenRules


def loss(**changes):
    return Loss.model_validate({"kd_weight": 1.0, **changes})


def kd_weights(at, **ramp):
    section = loss(ramps={"kd_weight": ramp})
    return [section.at(step).kd_weight for step in at]


def test_without_ramps_the_section_is_itself():
    section = loss()
    assert section.at(7) is section and section.moved(7) == {}


def test_linear():
    assert kd_weights([1, 2, 5, 6], to=0.0, steps=5) == pytest.approx([1.0, 0.75, 0.0, 0.0])


def test_cosine_has_its_middle_in_the_middle():
    assert kd_weights([1, 6, 11, 99], to=0.2, kind="cosine", steps=11) == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert kd_weights([2], to=0.2, kind="cosine", steps=11)[0] > 0.97, "flat at its start"


def test_wsd_warms_up_stays_and_decays():
    values = kd_weights(range(1, 12), to=0.0, kind="wsd", steps=10, warmup_steps=2, decay_steps=4)
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_all_three_numbers_move_and_the_rest_stays():
    ramps = {"kd_weight": {"to": 0.0, "steps": 1}, "ce_weight": {"to": 1.0, "steps": 1}}
    section = loss(ramps=ramps | {"temperature": {"to": 1.0, "steps": 1}}, temperature=4.0, top_k=7)
    moved = section.at(1)
    assert (moved.kd_weight, moved.ce_weight, moved.temperature, moved.top_k) == (0.0, 1.0, 1.0, 7)
    assert section.moved(1) == {"kd_weight": 0.0, "ce_weight": 1.0, "temperature": 1.0}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"ramps": {"kd_weight": {"to": 0.0, "kind": "wsd", "steps": 5}}}, "decay_steps"),
        ({"ramps": {"kd_weight": {"to": 0.0, "steps": 5, "warmup_steps": 2}}}, "kind"),
        ({"ramps": {"temperature": {"to": 0.0, "steps": 5}}}, "ramps.temperature.to"),
        ({"ramps": {"temperature": {"to": 1.0, "steps": 5}}, "student_temperature": 2.0}, "ramps.temperature"),
        ({"kd_weight": 0.0}, "kd_weight"),
        ({"divergence": "jsd", "tail": "drop"}, "tail"),
        ({"divergence": "skew_forward_kl", "tail": "renormalize_teacher"}, "tail"),
        ({"divergence": "tvd", "tail": "drop"}, "tail"),
    ],
)
def test_what_has_no_meaning_is_refused(changes, key):
    with pytest.raises(ValueError) as raised:
        loss(**changes)
    broken = [error["ctx"]["error"] for error in raised.value.errors()]
    assert all(isinstance(error, BrokenRules) for error in broken)
    assert key in [name for error in broken for name, _ in error.problems]


def test_a_weight_that_rises_from_nothing_is_enough():
    section = loss(kd_weight=0.0, ramps={"kd_weight": {"to": 1.0, "steps": 5}})
    assert section.at(5).kd_weight == 1.0
