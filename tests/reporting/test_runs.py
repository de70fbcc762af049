"""Run folders in any state: what is read, what is left out and said, what is refused."""

import json
import math

import pytest

from megakd.errors import ReportError
from megakd.reporting.runs import read_runs
from megakd.reporting.settings import care, differing, setting_texts, value_at
from tests.reporting import made


def read(folder):
    (run,) = read_runs([folder])
    return run


def test_a_whole_run(tmp_path):
    lines = made.lines_of()
    folder = made.write(tmp_path / "a", lines)
    (folder / "stopped.json").write_text('{"step": 23, "finished": true}')
    (folder / "evaluations.jsonl").write_text('{"student": "s", "ce": 4.0}\n{"student": "s", "ce": 3.5}\n')
    run = read(folder)
    train = [line for line in lines if line["kind"] == "train"]
    assert run.notes == [] and run.name == "a" and run.stopped == (23, True) and run.versions["torch"] == "2.13.0"
    assert run.of("train").steps == list(range(1, 24)) and run.of("validation").steps == [5, 10, 15, 20]
    for key in train[0].keys() - {"kind", "step"}:
        assert run.of("train").columns[key] == [line[key] for line in train], key
    assert [line["ce"] for line in run.evaluations] == [4.0, 3.5]
    assert run.config["train.steps"] == "23" and run.config["optimizer.lr"] == "0.0003"
    assert run.of("data").columns == {"samples": [1234]} and run.of("nothing").steps == []


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train"', "[1, 2", "\x00\x00\x00", "nul"])
def test_a_torn_last_line_is_left_out_and_said(tmp_path, torn):
    run = read(made.write(tmp_path / "a", made.lines_of(), torn=torn))
    assert run.of("train").steps[-1] == 23 and run.notes == ["the last line of metrics.jsonl was cut off: left out"]


def test_a_last_line_without_newline_counts(tmp_path):
    run = read(made.write(tmp_path / "a", made.lines_of(), torn=json.dumps(made.train_line(24))))
    assert run.of("train").steps[-1] == 24 and run.notes == []


def test_damaged_lines_are_named(tmp_path):
    folder = made.write(tmp_path / "a", made.lines_of(7))
    rows = (folder / "metrics.jsonl").read_bytes().splitlines()
    rows[2], rows[4] = b"\xff\xfe not text", b"12"
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*rows, b'{"kind": "train"}', b'{"step": 3}', b"", b""]))
    run = read(folder)
    assert run.of("train").steps == [1, 3, 5, 6, 7]
    assert run.notes[0] == "metrics.jsonl: lines 3, 5 cannot be read: left out"
    assert run.notes[1] == "2 lines of metrics.jsonl without a kind or a step: left out"


def test_steps_that_are_there_twice_and_out_of_order(tmp_path):
    lines = [made.train_line(step) for step in (1, 2, 4, 3)] + [made.train_line(2, ce=9.0)]
    run = read(made.write(tmp_path / "a", lines))
    assert run.of("train").steps == [1, 2, 3, 4] and run.of("train").columns["ce"][1] == 9.0
    assert run.notes == ["1 line of metrics.jsonl of a step that was there before: the later one counts"]


def test_values_that_are_not_finite_or_no_numbers(tmp_path):
    lines = [made.train_line(step) for step in range(1, 12)]
    for step in (2, 3, 5, 7, 8, 9, 11):
        lines[step - 1]["kd"] = math.nan if step % 2 else math.inf
    lines[3] |= {"ce": None, "lr": "fast", "agreement": True, "grad_norm": 10**400}
    del lines[4]["ce"]
    run = read(made.write(tmp_path / "a", lines))
    train = run.of("train")
    assert run.notes == [
        "train kd is not finite at steps 2, 3, 5, 7, 8 and 2 others",
        "train grad_norm is not finite at step 4",
    ]
    assert train.points("kd") == ([1, 4, 6, 10], [4.0, 1.0, 4 / 6, 0.4])
    assert [train.columns[key][3] for key in ("ce", "lr", "agreement")] == [None] * 3
    assert train.points("ce")[0] == [1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert train.points("loss") == (train.steps, train.columns["loss"]) and train.points("nothing") == ([], [])


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_run_without_a_step(tmp_path, content):
    folder = made.write(tmp_path / "a", [])
    (folder / "metrics.jsonl").write_bytes(content)
    assert read(folder).notes == ["metrics.jsonl has no step yet"]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (None, "config.yaml is missing or empty: no settings are shown"),
        (b"a: [1", "config.yaml is not valid YAML: no settings are shown"),
        (b"\xff", "config.yaml is not valid YAML: no settings are shown"),
        (b"- 1", "config.yaml is missing or empty: no settings are shown"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, content, note):
    folder = made.write(tmp_path / "a", made.lines_of(3))
    (folder / "config.yaml").unlink()
    if content is not None:
        (folder / "config.yaml").write_bytes(content)
    run = read(folder)
    assert run.notes == [note] and run.config == {} and run.of("train").steps == [1, 2, 3]


@pytest.mark.parametrize("content", ["{", "[]", '{"step": "x"}'])
def test_a_last_word_that_cannot_be_read(tmp_path, content):
    folder = made.write(tmp_path / "a", made.lines_of(3))
    (folder / "stopped.json").write_text(content)
    assert read(folder).stopped is None and read(folder).notes == ["stopped.json cannot be read"]


def test_what_is_no_run(tmp_path):
    folder = made.write(tmp_path / "runs" / "a", made.lines_of(3))
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "nowhere": ("does not exist", "name the run.dir"),
        folder / "metrics.jsonl": ("is a file", f"name the run's folder: {folder}"),
        tmp_path / "empty": ("is no run: it holds no metrics.jsonl", "name the run.dir"),
        tmp_path / "runs": ("is no run", f"its folders are runs: megakd report {folder}"),
    }
    for path, (message, hint) in cases.items():
        with pytest.raises(ReportError) as caught:
            read_runs([path])
        assert str(path) in str(caught.value) and message in str(caught.value) and hint in caught.value.hint


def test_a_run_that_is_named_twice_is_shown_once(tmp_path):
    a, b = (made.write(tmp_path / name, made.lines_of(3)) for name in "ab")
    (tmp_path / "last").symlink_to(a)
    runs = read_runs([a, b, tmp_path / "last", a / ".." / "a"])
    assert [(run.name, run.notes) for run in runs] == [("a", ["named 3 times, shown once"]), ("b", [])]


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    paths = ["x/one/kd", "y/one/kd", "x/two/kd", "x/ce"]
    runs = read_runs([made.write(tmp_path / path, made.lines_of(1)) for path in paths])
    assert [run.name for run in runs] == ["x/one/kd", "y/one/kd", "two/kd", "ce"]


def test_tokens_and_seconds_of_a_run_that_logs_one_step_in_five(tmp_path):
    lines = [made.train_line(step, seconds=step / 5) for step in (5, 10, 15)]
    lines += [made.validation_line(step) for step in (3, 10, 12, 20)]
    run = read(made.write(tmp_path / "a", lines))
    assert run.of("train").axes["seconds"] == [5 * 1, 5 * (1 + 2), 5 * (1 + 2 + 3)]
    assert run.of("train").axes["tokens"] == [97 * 5, 97 * 10, 97 * 15]
    assert run.of("validation").axes["seconds"] == pytest.approx([3, 15, 15 + 2 * 3, 30])
    assert run.of("validation").axes["tokens"] == pytest.approx([97 * 3, 97 * 10, 97 * 12, 97 * 15])


def test_axes_that_were_not_measured(tmp_path):
    lines = [made.train_line(step) for step in (1, 2, 3)]
    for line in lines:
        del line["tokens"]
    del lines[0]["seconds"]
    lines[2]["seconds"] = math.nan
    run = read(made.write(tmp_path / "a", [*lines, made.validation_line(3)]))
    assert run.of("train").axes == {"step": [1, 2, 3], "seconds": [2.0, 4.0, 6.0]}
    alone = read(made.write(tmp_path / "b", [made.validation_line(3)]))
    assert alone.of("validation").axes == {"step": [3]}


def test_settings_that_differ(tmp_path):
    a = made.write(tmp_path / "a", made.lines_of(3))
    b = made.write(tmp_path / "b", made.lines_of(3), loss={"top_k": 11, "ce_weight": 0.25}, optimizer__lr=1e-3)
    alone = [{k: v for k, v in line.items() if k not in ("kd", "agreement", "teacher_ce")} for line in made.lines_of(3)]
    c = made.write(tmp_path / "c", alone, teacher=None, loss=None)
    (b / "versions.txt").write_text("megakd 0.1.0\ntorch 2.14.0\n")
    runs = read_runs([a, b, c])
    names = differing(runs)
    assert {"loss.top_k", "optimizer.lr", "teacher.checkpoint", "versions.torch", "loss.ce_weight"} <= set(names)
    assert not {"teacher", "run.dir", "versions.megakd", "train.steps"} & set(names)
    texts = [value_at(setting_texts(run), "teacher.checkpoint") for run in runs]
    assert texts == ["runs/teacher", "runs/teacher", "teacher: null"]
    assert [value_at(setting_texts(run), "loss.top_k") for run in runs] == ["7", "11", "64"]
    assert value_at({"a.b": "1"}, "a.c") == "not there"
    assert care(runs, "train", "kd") == ["loss.top_k"], "c measures no divergence, so its settings do not matter"
    assert {"loss.top_k", "loss.ce_weight", "teacher.checkpoint"} <= set(care(runs, "train", "loss"))
    assert care(runs, "train", "ce") == care(runs[:1], "train", "loss") == []
