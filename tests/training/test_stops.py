"""Where a run may be asked to stop, and what the next launch owes; who owns its folder."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import time
import types

import pytest

from megakd.config import Config
from megakd.errors import ConfigError
from megakd.ranks import Ranks
from tests.ranks import run_ranks
from tests.training import runs


class StopsAtQuestion(runs.OneOfThePool):
    """Is asked to stop when the loop has asked so many times whether it was."""

    def __init__(self, rank, number):
        super().__init__(rank)
        self.left = number

    def agree_to_stop(self):
        self.left -= 1
        return self.left == 0


def train_until(rank, ranks, config, question):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runs, "OneOfThePool", lambda rank: StopsAtQuestion(rank, question))
        return runs.train(rank, ranks, config)


def test_a_validation_given_up_is_made_up_for(folder, tmp_path):
    """Questions: 1 at the start, then after steps 1, 2, before 4 batches of validation, after steps 3, 4, ..."""
    config = runs.values(folder, tmp_path / "whole", train__steps=4, eval__every_steps=2, eval__samples=32)
    config["student"]["model"]["hidden_dropout"] = 0.1
    assert run_ranks(2, runs.train, config) == [None, None]
    config["run"]["dir"] = str(tmp_path / "stopped")
    stops = [(6, 2), (3, 2), (9, 4)]  # in the first validation; again, made up for; after it and in the last one
    for question, step in stops:
        assert run_ranks(2, train_until, config, question) == [None, None]
        stopped = json.loads((tmp_path / "stopped" / "stopped.json").read_text())
        assert stopped == {"step": step, "finished": False}, question
        assert (tmp_path / "stopped" / "checkpoints" / f"step_{step:08d}" / "megakd.json").exists()
    assert run_ranks(2, runs.train, config) == [None, None]
    assert json.loads((tmp_path / "stopped" / "stopped.json").read_text()) == {"step": 4, "finished": True}
    for kind in ("train", "validation"):
        assert runs.lines(tmp_path / "stopped", kind) == runs.lines(tmp_path / "whole", kind)


def test_a_forked_child_does_not_hold_the_folder(tmp_path):
    from megakd.training.run_folder import take

    read, write = os.pipe()
    with take(tmp_path):
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
        with pytest.raises(ConfigError, match="in use by another launch"), take(tmp_path):
            pass
    try:
        with take(tmp_path):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)


@pytest.mark.parametrize("step", ["sweep", "folder.settle", "publish_text", "pathlib.Path.unlink", "sync_folder"])
def test_a_run_folder_that_lets_some_be_written_and_not_all_is_named(step, tmp_path, monkeypatch):
    from megakd.training import run_folder

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    holder = run_folder
    for name in step.split(".")[:-1]:
        holder = getattr(holder, name)
    monkeypatch.setattr(holder, step.rpartition(".")[2], refuse)
    config = Config.model_construct(run=types.SimpleNamespace(dir=str(tmp_path), resume="auto"))
    with (
        contextlib.ExitStack() as held,
        pytest.raises(ConfigError, match=rf"run.dir {tmp_path} cannot be written: .*Read-only"),
    ):
        run_folder._open(config, held)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_stop_while_rank_0_tokenizes_and_the_others_wait(folder, tmp_path):
    line = json.dumps({"text": "the same words again and again " * 20}) + "\n"
    (tmp_path / "long.jsonl").write_text(line * (60_000_000 // len(line)))
    config = runs.values(folder, tmp_path / "run", data__train=str(tmp_path / "long.jsonl"), data__workers=2)
    ranks = runs.by_hand(tmp_path, 2, "train", config)
    try:
        workers = wait_for(lambda: [worker for rank in ranks for worker in runs.session_leaders(rank.pid)])
        held = {os.readlink(file) for worker in workers for file in pathlib.Path(f"/proc/{worker}/fd").iterdir()}
        for rank in ranks:  # as torchrun sends it on
            rank.send_signal(signal.SIGTERM)
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
        wait_for(lambda: not [p for p in workers if pathlib.Path(f"/proc/{p}").exists()], 60)
    finally:
        for rank in ranks:
            rank.kill()
    output = "".join(outputs)
    assert [rank.returncode for rank in ranks] == [0, 0], output
    assert "was asked to stop by SIGTERM before the first step" in output, output
    assert "DataError" not in output, "a worker's end is no failure of its own"
    assert held and not [name for name in held if name.startswith("socket:") or name.endswith("owner.lock")]
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"step": 0, "finished": False}
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_time_after_which_a_launch_stops(folder, tmp_path):
    config = runs.values(folder, tmp_path / "run", train__steps=10**6, run__stop_after="2s")
    (rank,) = runs.by_hand(tmp_path, 1, "train", config)
    try:
        output = rank.communicate(timeout=240)[0]
    finally:
        rank.kill()
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert rank.returncode == 0 and stopped["finished"] is False and stopped["step"] < 10**6, output
    whole = tmp_path / "run" / "checkpoints" / f"step_{stopped['step']:08d}" / "megakd.json"
    assert whole.exists() == (stopped["step"] > 0), output
    assert f"run.stop_after has passed: the checkpoint of step {stopped['step']} is written" in output


def test_the_time_of_one_rank_is_over_for_all_of_them():
    with Ranks("cpu") as ranks:
        ranks.stop_after(3600)
        assert not ranks.agree_to_stop()
        ranks.stop_after(0)
        assert ranks.stop_requested() and ranks.agree_to_stop()


def test_a_time_that_is_none_is_refused(folder, tmp_path):
    for wrong in ("4 hours", "3m2h", "0s", ""):
        with pytest.raises(ConfigError, match=r"run\.stop_after"):
            Config.from_dict(runs.values(folder, tmp_path, run__stop_after=wrong))
    assert Config.from_dict(runs.values(folder, tmp_path, run__stop_after="1d4h")).run.stop_after == "1d4h"
