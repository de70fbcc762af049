"""metrics.jsonl: lines of steps that count, whatever state a kill or a disk has left the file in."""

import importlib.util
import json
import os
import sys
import types

import pytest

from megakd.errors import ConfigError, TrainingError
from megakd.training.metrics import MetricsLog, check_sinks, drop_lines_after, has_line
from tests.training import small


def line(step, kind="train"):
    return json.dumps({"kind": kind, "step": step, "loss": 1.5}).encode() + b"\n"


DAMAGED = {
    "not UTF-8": b'{"kind": "train", "step": 1, "note": "\xff\xfe"}\n',
    "zeros": bytes(512) + b"\n",
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "a text": b'"step"\n',
    "a step that is none": b'{"kind": "train", "step": "1"}\n',
    "no step": b'{"kind": "train"}\n',
    "brackets": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_no_line_of_metrics_is_left_out_and_said(tmp_path, caplog, what):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + DAMAGED[what] + line(2) + line(3))
    assert has_line(path, "train", 3) and not has_line(path, "validation", 3)
    drop_lines_after(path, 2)
    assert path.read_bytes() == line(1) + line(2)
    assert "1 damaged lines are left out" in caplog.text


def test_a_line_cut_off_by_a_kill_goes_without_a_word(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2)[:-7])
    drop_lines_after(path, 2)
    assert path.read_bytes() == line(1) and not caplog.text


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    os.mkdir(tmp_path / "metrics.jsonl")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written: .*\nhint: free space"):
        MetricsLog(small.config(run__dir=str(tmp_path)), 0, 8, enabled=True)


def test_lines_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    log, synced = MetricsLog(small.config(run__dir=str(tmp_path), log__progress=False), 0, 8, enabled=True), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    log.write("train", 1, {"loss": 1.5})
    log.sync()
    log.close()
    assert synced == [str(tmp_path / "metrics.jsonl")]


WANDB = {"log__wandb_project": "kd", "log__wandb_entity": "us", "log__wandb_group": "g", "log__wandb_tags": ["a", "b"]}


@pytest.fixture
def wandb(monkeypatch):
    """A service that keeps what it is told: (id, what it was begun with, what was logged) of each run."""
    module, runs = types.ModuleType("wandb"), []

    def begin(**given):
        logged = []
        runs.append((given.pop("id"), given, logged))
        return types.SimpleNamespace(log=lambda named, step: logged.append((step, named)), finish=lambda: None)

    module.Error, module.init, module.runs = type("Error", (Exception,), {}), begin, runs
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_are_told_whose_run_it_is_and_that_it_goes_on(tmp_path, wandb):
    for folder, step in (("one", 1), ("one", 2), ("two", 1)):
        (tmp_path / folder).mkdir(exist_ok=True)
        config = small.config(run__dir=str(tmp_path / folder), log__progress=False, **WANDB)
        log = MetricsLog(config, step - 1, 8, enabled=True)
        log.write("train", step, {"loss": 1.5, "note": "not a number"})
        log.close()
    (first, begun, logged), (again, _, logged_again), (other, _, _) = wandb.runs
    assert first == again != other and logged == [(1, {"train/loss": 1.5})]
    assert logged_again == [(2, {"train/loss": 1.5})]
    assert begun.pop("config")["log"]["wandb_project"] == "kd"
    assert begun == dict(project="kd", entity="us", group="g", tags=["a", "b"], name="one", resume="allow")
    MetricsLog(config, 0, 8, enabled=False).close()
    assert len(wandb.runs) == 3


def test_a_service_that_refuses_is_named(tmp_path, wandb):
    def refuse(**_):
        raise wandb.Error("no such entity")

    wandb.init = refuse
    with pytest.raises(ConfigError, match=r"(?s)'kd', but Weights & Biases refuses: no such.*hint: `wandb login`"):
        MetricsLog(small.config(run__dir=str(tmp_path), log__progress=False, **WANDB), 0, 8, enabled=True)


def test_a_missing_package_is_found_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_sinks(small.config(run__dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"(?s)package wandb is not installed.*megakd\[wandb\]"):
        check_sinks(small.config(run__dir=str(tmp_path), **WANDB))
