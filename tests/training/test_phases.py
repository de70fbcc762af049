"""Where the seconds of a step go, what a launch says of itself, and the trace of some steps."""

import gzip
import json
import logging
import math
import time

import pytest

from megakd.training.phases import Phases
from tests.ranks import run_ranks
from tests.training import runs, small

NAMES = {"data_seconds", "teacher_seconds", "student_seconds", "optimizer_seconds", "save_seconds", "other_seconds"}


def phases_of(line):
    return {name: value for name, value in line.items() if name.endswith("_seconds")}


def train_lines(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def test_the_phases_of_every_line_sum_to_its_seconds(folder, teacher, tmp_path):
    config = runs.distil(folder, teacher, tmp_path, checkpoint__every_steps=2, train__steps=5)
    assert run_ranks(2, runs.train, config) == [None, None]
    lines = train_lines(tmp_path)
    assert len(lines) == 5
    for line in lines:
        found = phases_of(line)
        assert found.keys() == NAMES
        assert math.fsum(found.values()) == pytest.approx(line["seconds"], rel=1e-12)
        assert all(found[name] > 0 for name in NAMES - {"save_seconds"}) and found["save_seconds"] >= 0
        assert found["other_seconds"] < 0.5 * line["seconds"]
    saved = [line["save_seconds"] for line in lines]
    assert min(saved[2], saved[4]) > 5 * max(saved[0], saved[1], saved[3]), "the line after a save has it"


def test_a_run_without_a_teacher_has_no_seconds_of_one(folder, tmp_path):
    assert run_ranks(1, runs.train, runs.values(folder, tmp_path, train__steps=2)) == [None]
    assert [phases_of(line).keys() for line in train_lines(tmp_path)] == [NAMES - {"teacher_seconds"}] * 2


def test_what_is_saved_between_two_lines_is_spread_over_their_steps():
    phases = Phases()

    def step(*names):
        phases.start()
        for name in names:
            phases.begin(name)
            time.sleep(0.01)
        return phases

    first = step("data", "student").read(last=True)
    with phases.saving():
        time.sleep(0.06)
    step("data").read(last=False)
    step("data").read(last=False)
    third = step("data", "student", "other", "student").read(last=True)
    fourth = step("student").read(last=True)
    assert first["save_seconds"] == fourth["save_seconds"] == 0
    assert 0.02 <= third["save_seconds"] < 0.04
    assert third["student_seconds"] >= 0.02 and 0.01 <= third["data_seconds"] < 0.02 <= third["seconds"]
    for line in (first, third, fourth):
        assert math.fsum(phases_of(line).values()) == pytest.approx(line["seconds"], rel=1e-12)


MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}


def sizes_of_parts(rank, ranks, axes, moe):
    tp, pp = axes.get("tp", 1), axes.get("pp", 1)
    with small.layout(tp, pp, ep=axes.get("ep", 1)) as groups:
        import torch

        from megakd.training.overview import count_parameters

        more = {f"parallel__{name}": size for name, size in axes.items() if name not in ("tp", "pp")}
        section = small.student_section(num_layers=4, **({"moe": MOE} if moe else {}))
        config = small.config(tp, pp, student__model=section, **more)
        gpt = small.build(section, config, groups, seed=1)
        return count_parameters(gpt, groups, torch.device("cpu"))


@pytest.mark.parametrize(
    ("moe", "layouts"),
    [
        (False, [(1, {}), (2, {"pp": 2}), (2, {"pp": 2, "vpp": 2})]),
        (True, [(1, {}), (2, {"ep": 2}), (2, {"tp": 2, "sp": True}), (4, {"tp": 2, "sp": True, "ep": 4}),
                (4, {"pp": 2, "ep": 2})]),
    ],
)  # fmt: skip
def test_parameters_of_virtual_stages_and_divided_experts_are_counted_once(moe, layouts):
    counts = {count for n, axes in layouts for count in run_ranks(n, sizes_of_parts, axes, moe)}
    assert len(counts) == 1, counts


def sizes(rank, ranks, tp, pp, tied):
    with small.layout(tp, pp) as groups:
        import torch

        from megakd.training.overview import count_parameters

        gpt = small.build(small.student_section(tie_embeddings=tied), small.config(tp, pp), groups, seed=1)
        return count_parameters(gpt, groups, torch.device("cpu"))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once_at_any_layout(tied):
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32
    want = 2 * layer + 32 + 1024 * 32 * (1 if tied else 2)
    for ranks, tp, pp in ((1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 1)):
        assert run_ranks(ranks, sizes, tp, pp, tied) == [want] * ranks


def said_in_training(rank, ranks, config):
    """What the run logs."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("megakd")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        return runs.train(rank, ranks, config), lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_a_launch_says_once_what_it_is_and_traces_what_was_asked_for(folder, teacher, tmp_path):
    config = runs.distil(folder, teacher, tmp_path, train__steps=5)
    config["log"]["profile"] = {"steps": [2, 3], "ranks": [1]}
    config["log"]["every_steps"] = 3
    answers = run_ranks(2, said_in_training, config)
    assert [error for error, _ in answers] == [None, None]
    (line,) = [line for line in answers[0][1] if " parameters" in line]
    assert line.startswith("step 1: student ") and ", teacher " in line and "; 4 to go: 0:00:" in line
    assert "a step is 8 samples of up to 32 tokens, 256 supervised; " in line and " GB of memory on the fullest" in line
    assert [file.name for file in (tmp_path / "profile" / "steps_2_3").iterdir()] == ["rank_00001.json.gz"]
    with gzip.open(tmp_path / "profile" / "steps_2_3" / "rank_00001.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::embedding" for event in events) >= 2, "of two steps, student and teacher"


def test_a_trace_that_a_run_ends_in_is_written(folder, tmp_path):
    config = runs.values(folder, tmp_path, train__steps=2)
    config["log"]["profile"] = {"steps": [2, 9]}
    assert run_ranks(1, runs.train, config) == [None]
    assert (tmp_path / "profile" / "steps_2_9" / "rank_00000.json.gz").stat().st_size > 1000
