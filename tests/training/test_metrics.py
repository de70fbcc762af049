"""metrics.jsonl: lines of steps that count, whatever state a kill or a disk has left the file in."""

import json
import os

import pytest

from megakd.errors import TrainingError
from megakd.training.metrics import MetricsLog, drop_lines_after, has_line
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
