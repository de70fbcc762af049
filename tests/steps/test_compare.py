"""Parts of ranks become one whole; two wholes are compared stage by stage; ties are no difference."""

import dataclasses

import numpy as np
import pytest

from megakd.errors import ConfigError
from megakd.steps.compare import TOLERANCES, compare
from megakd.steps.comparison import compare_records
from tests.steps import made

TOLERANCE = TOLERANCES["fp32"]


def stages(a, b):
    return {stage.name: stage for stage in compare(a, b, TOLERANCE)}


def differing(found):
    return [name for name, stage in found.items() if stage.differs]


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)])
def test_the_layout_does_not_show(tp, pp, dp, tmp_path):
    one, other = made.whole(tmp_path / "1", made.batch()), made.whole(tmp_path / "2", made.batch(), tp, pp, dp)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert np.array_equal(a, b), field.name
    assert one.norms == pytest.approx({made.WHOLE: 2.0, made.SPLIT: 5.0}) and one.norms == pytest.approx(other.norms)
    assert not one.conflicts and not other.conflicts
    found = stages(one, other)
    assert list(found) == ["ids", "labels", "targets", "losses", "gradients"] and not differing(found)
    assert found["ids"].summary == "4 samples, 17 ids" and found["targets"].summary.startswith("15 tokens")


def changed(change):
    batch = made.batch()
    change(batch)
    return batch


SECOND, LAST = (
    "sample 1 of the batch (epoch 0, index 18 of the data, 2. of its row)",
    "sample 2 of the batch (epoch 0, ",
)
CHANGES = {
    "ids": (lambda b: b.ids[2].__setitem__(4, 22), f"{SECOND}, position 4: id "),
    "labels": (lambda b: b.labels[3].__setitem__(1, 21), f"{LAST}index 19 of the data), position 1: label "),
    "targets": (lambda b: b.tails.__setitem__(4, -0.91), "log of the mass outside the entries: -0.9000 -> -0.9100"),
    "losses": (lambda b: b.losses.__iadd__(2e-4), "the mean loss of all tokens"),
    "gradients": (lambda b: setattr(b, "squares", (4.0, 9.0, 17.0)), f"{made.SPLIT}: 5 -> 5.09902 (x 1.02)"),
}


@pytest.mark.parametrize("stage", CHANGES)
def test_each_stage_sees_what_is_its_own(stage, tmp_path):
    change, words = CHANGES[stage]
    one, other = made.whole(tmp_path / "1", made.batch()), made.whole(tmp_path / "2", changed(change), 2, 1, 2)
    found = stages(one, other)
    assert differing(found) == [stage] and words in "\n".join(found[stage].lines), found[stage]


def test_entries_that_differ_among_ties_alone_are_no_difference(tmp_path):
    """The last entry's place is taken by an id that is as likely; by one that is not; by one where there was none."""
    batch = made.batch()
    first, second, last = batch.entries[6]
    free = next(i for i in range(made.VOCAB) if i not in {first[0], second[0], last[0]})

    def with_last(number, entry):
        other = made.batch()
        other.entries[6] = sorted([first, second, *entry])
        return differing(stages(one, made.whole(tmp_path / str(number), other)))

    one = made.whole(tmp_path / "1", batch)
    assert with_last(2, [(free, last[1] + 1e-4)]) == []
    assert with_last(3, [(free, last[1] + 0.1)]) == ["targets"]
    assert with_last(4, []) == ["targets"]


def test_what_is_not_finite_differs_from_what_is(tmp_path):
    batch, other, same = made.batch(), made.batch(), made.batch()
    batch.tails[3] = same.tails[3] = other.losses[2] = -np.inf
    other.tails[3] = -80.0
    one = made.whole(tmp_path / "1", batch)
    assert differing(stages(one, made.whole(tmp_path / "2", same))) == []
    assert differing(stages(one, made.whole(tmp_path / "3", other))) == ["targets", "losses"]


def test_ranks_of_one_launch_that_do_not_agree_are_named(tmp_path):
    one = made.whole(tmp_path / "1", made.batch())

    def planted(number, layout, rank, name, at, value):
        ranks = made.parts(made.batch(), *layout)
        ranks[rank].arrays[name][at] = value
        found = stages(one, made.read_whole(made.write(tmp_path / str(number), ranks)))
        return differing(found)[0], found[differing(found)[0]].lines[0]

    assert planted(2, (2, 1, 1), 1, "ids", 3, 22)[0] == "ids"
    assert planted(3, (1, 2, 1), 0, "labels", 3, 22)[0] == "labels"
    stage, line = planted(4, (2, 1, 1), 1, "loss", 3, 7.0)
    assert stage == "losses" and line.startswith("in the replay: rank 1 has another loss than rank 0: 7, not ")
    stage, line = planted(5, (2, 1, 1), 1, "squares", 0, 4.1)
    assert stage == "gradients" and f"{made.WHOLE}: rank 1 has a gradient of norm 2.02485, rank 0" in line
    assert planted(6, (1, 1, 2), 1, "squares", 1, 4.1)[0] == "gradients"


def test_a_batch_of_other_samples_is_named(tmp_path):
    one, ranks = made.whole(tmp_path / "1", made.batch()), made.parts(made.batch(), 1, 1, 2)
    ranks[1].arrays["place"][-1] = 5
    found = stages(one, made.read_whole(made.write(tmp_path / "2", ranks)))
    assert differing(found) == ["ids"]
    assert found["ids"].lines == [
        "sample 2 of the batch (epoch 0, index 19 of the data): not in the replay",
        "sample 5 of the batch (epoch 0, index 19 of the data): not in the record",
    ]


def test_a_parameter_that_one_side_has_alone(tmp_path):
    one, ranks = made.whole(tmp_path / "1", made.batch()), made.parts(made.batch(), 1, 1, 1)
    ranks[0].parameters[0] = ("another.weight", False)
    found = stages(one, made.read_whole(made.write(tmp_path / "2", ranks)))
    assert found["gradients"].lines == [f"{made.WHOLE}: not in the replay", "another.weight: not in the record"]


def test_the_coarser_precision_decides_unless_a_flag_does(tmp_path):
    other = made.batch()
    other.tails[4] -= 0.1
    one = made.write(tmp_path / "1", made.parts(made.batch(), 1, 1, 1))
    same = made.write(tmp_path / "2", made.parts(other, 1, 1, 1))
    half = made.write(tmp_path / "3", made.parts(other, 1, 1, 1), precision="bf16")
    assert [compare_records(one, b, {})[1] for b in (same, half)] == [True, False]
    assert compare_records(one, half, {"targets": 0.01})[1] and not compare_records(one, same, {"targets": 0.2})[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"settings": {"teacher.checkpoint": "else", "loss.top_k": 4}}, "other settings than .*: loss.top_k 3 -> 4"),
        ({"settings": {"loss.top_k": 3}}, "was recorded with a teacher, .* has none"),
        ({"model": {"hidden_size": 48}}, "another model than .*: hidden_size 32 -> 48"),
        ({"tokenizer": "beef"}, "was recorded with tokenizer f00d, .* has beef"),
    ],
)
def test_records_of_two_runs_are_not_compared(values, words, tmp_path):
    ranks = made.parts(made.batch(), 1, 1, 1)
    with pytest.raises(ConfigError, match=words):
        compare_records(made.write(tmp_path / "1", ranks), made.write(tmp_path / "2", ranks, **values), {})


def test_what_may_differ_is_said(tmp_path):
    ranks = made.parts(made.batch(), 1, 1, 1)
    other = {"teacher": {"kind": "online", "model": {"rotary_base": 500}}, "data": {"train": "xyz"}}
    text, differs = compare_records(made.write(tmp_path / "1", ranks), made.write(tmp_path / "2", ranks, **other), {})
    assert (
        not differs and "other data: train abc -> xyz" in text and "another teacher: rotary_base 10000 -> 500" in text
    )
