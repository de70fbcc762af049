"""Bytes of a recorded step: read back as they were, and every kind of damage named."""

import json

import numpy as np
import pytest

from megakd.errors import StepError
from megakd.steps.folder import RECORD, own_digest, rank_file, read_record
from megakd.steps.whole import read_whole
from tests.steps import made


@pytest.fixture
def record(tmp_path):
    return made.write(tmp_path / "step", made.parts(made.batch(), 2, 2, 1))


def test_parts_come_back_as_they_were(record):
    for rank, want in enumerate(made.parts(made.batch(), 2, 2, 1)):
        got = record.read_rank(rank)
        assert (got.tp, got.pp, got.dp, got.parameters) == (want.tp, want.pp, want.dp, want.parameters)
        assert got.arrays.keys() == want.arrays.keys()
        assert all(np.array_equal(got.arrays[name], want.arrays[name]) for name in want.arrays)


def test_missing_files_are_named_at_once(record):
    for rank in (1, 2):
        (record.path / rank_file(rank)).unlink()
    with pytest.raises(StepError, match=r"lacks rank_00001.safetensors, rank_00002.safetensors: .* by 4 ranks"):
        read_record(record.path)


def test_a_file_that_was_cut_off_is_named_at_once(record):
    file = record.path / rank_file(3)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StepError, match=r"rank_00003.safetensors is [0-9,]+ bytes long, [0-9,]+ were written"):
        read_record(record.path)


def test_every_byte_of_a_rank_is_guarded(record):
    file = record.path / rank_file(2)
    content = file.read_bytes()
    for at in range(0, len(content), 41):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(StepError, match=r"rank_00002.safetensors of rank 2 is damaged"):
            read_whole(record)


def test_every_byte_of_the_record_is_guarded(record):
    file = record.path / RECORD
    content = file.read_bytes()
    for at in range(0, len(content), 41):
        if content[at : at + 1].isspace():
            continue
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(StepError):
            read_record(record.path)
    file.write_bytes(content[:-7])
    with pytest.raises(StepError, match=r"step.json is damaged"):
        read_record(record.path)


def edited(record, **changes):
    values = json.loads((record.path / RECORD).read_text())
    values.pop("digest")
    values |= changes
    (record.path / RECORD).write_text(json.dumps(values | {"digest": own_digest(values)}))
    return record.path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, r"has format 2 of a recorded step, this megakd .* reads 1"),
        ({"step": "1"}, "step is '1'"),
        ({"layout": {"tp": 1, "pp": 1, "dp": 1}}, "4 ranks for the layout"),
        ({"ranks": [{"tp": -1}]}, "a rank's entry is|damaged"),
        ({"digests": {"algorithm": "md5"}}, "digests of the kind"),
    ],
)
def test_what_a_record_must_say(record, changes, words):
    with pytest.raises(StepError, match=words):
        read_record(edited(record, **changes))


def test_a_folder_that_is_no_step_names_those_that_are_near(tmp_path):
    made.write(tmp_path / "run" / "steps" / "step_00000001", made.parts(made.batch(), 1, 1, 1))
    with pytest.raises(StepError, match=r"holds no step.json\nhint: recorded steps are in .*step_00000001"):
        read_record(tmp_path / "run")
    with pytest.raises(StepError, match=r"does not exist\nhint: run.record_steps"):
        read_record(tmp_path / "none")


@pytest.mark.parametrize("name", ["loss", "labels", "entries", "length", "squares", "ids"])
def test_arrays_that_do_not_fit_are_not_written(name, tmp_path):
    ranks = made.parts(made.batch(), 1, 1, 1)
    ranks[0].arrays[name] = ranks[0].arrays[name][:-1]
    with pytest.raises(ValueError, match=r"lengths|losses|entries|sums"):
        made.write(tmp_path / "step", ranks)


def test_a_step_without_its_last_stage_is_none(tmp_path):
    record = made.write(tmp_path / "step", made.parts(made.batch(), 1, 2, 1)[:1])
    with pytest.raises(StepError, match="no losses of a data-parallel rank"):
        read_whole(record)
