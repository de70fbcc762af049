"""Launches over two nodes, each with an agent of torchrun: one rank is killed, or a whole node is gone."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import time

import pytest
import torch.distributed as dist

from tests import forked
from tests.forked import free_port
from tests.ranks import run_ranks
from tests.training import runs

OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
DIES_AT = {"0": 6, "1": 10}  # attempt -> step


class Nodes:
    """Two agents and their ranks.

    Args:
        call: what each rank does, as tests.agent.rank takes it.
    """

    def __init__(self, folder, restarts, *call, **variables):
        port = free_port()
        self.files = [folder / f"pid_{node}" for node in range(2)]
        environment = runs.ENVIRONMENT | OWN_STORE | variables
        self.agents = [
            forked.Forked("tests.agent", 2, node, port, restarts, self.files[node], *call,
                          environment=environment, together=True)
            for node in range(2)
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for agent in self.agents:
            agent.kill()
        for file in filter(pathlib.Path.exists, self.files):
            kill(self.rank(file))

    @staticmethod
    def rank(file):
        return int(file.read_text())

    def outputs(self, seconds):
        deadline = time.monotonic() + seconds
        for agent in self.agents:
            agent.process.join(max(0, deadline - time.monotonic()))
        return [pathlib.Path(agent.output.name).read_text() for agent in self.agents]


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def train_and_die(config):
    """A rank of a run; the second dies at a step of the first two attempts."""
    from megakd.cli import main
    from megakd.training.loop import Loop

    one_step, attempt = Loop.one_step, os.environ["TORCHELASTIC_RESTART_COUNT"]

    def deadly(self):
        if self.ranks.rank == 1 and self.progress.step == DIES_AT.get(attempt):
            os.kill(os.getpid(), signal.SIGKILL)
        one_step(self)

    Loop.one_step = deadly
    return main(["train", config])


@pytest.mark.slow
def test_a_killed_rank_is_restarted_from_the_last_checkpoint_and_not_forever(tmp_path):
    runs.prepare(tmp_path)
    config = runs.values(tmp_path, tmp_path / "whole", train__steps=12, checkpoint__every_steps=4)
    assert run_ranks(2, runs.train, config) == [None, None]
    config["run"]["dir"] = str(tmp_path / "killed")
    call = ("tests.test_nodes:train_and_die", runs.write_config(tmp_path, config))
    with Nodes(tmp_path, 1, *call) as nodes:
        said = nodes.outputs(120)
        assert [agent.returncode for agent in nodes.agents] == [1, 1], said
    assert "continuing from" in said[0] + said[1] and "step_00000004" in said[0] + said[1], said
    assert len(runs.lines(tmp_path / "killed")) >= 8, said
    assert run_ranks(2, runs.train, config) == [None, None]
    assert runs.lines(tmp_path / "killed") == runs.lines(tmp_path / "whole")


def take_steps(folder):
    """Says so once all watches have had the time to speak."""
    from megakd.ranks import Ranks

    with Ranks("cpu") as ranks:
        ranks.agree_to_stop()
        for step in range(6000):
            ranks.pulse.mark("step", step)
            dist.barrier()
            time.sleep(0.1)
            if step == 30:
                pathlib.Path(folder, f"steps_{ranks.rank}").touch()


@pytest.mark.parametrize("gone", [1, 0])
def test_a_node_that_vanishes_is_named_and_ends_the_other(gone, tmp_path):
    """The store is on the first: where that is gone, nobody is left to ask which rank it was."""
    with Nodes(tmp_path, 0, "tests.test_nodes:take_steps", str(tmp_path)) as nodes:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("steps_*"))) < 2:
            assert time.monotonic() < deadline, nodes.outputs(0)
            time.sleep(0.1)
        lost = nodes.rank(nodes.files[gone])
        nodes.agents[gone].kill()
        kill(lost)
        said = nodes.outputs(60)[1 - gone]
        assert nodes.agents[1 - gone].returncode == 1, said
    if gone:
        host = socket.gethostname()
        assert f"rank 0 stopped: rank 1 is gone without a word (process {lost} on {host}; its machine lost" in said
    else:
        assert re.search(
            r"rank 1 lost a peer that left no message .*; nor does the store at 127.0.0.1:\d+ answer", said
        )
