"""Ranks that are tasks of srun, by what it sets in their environment; a real Slurm is in tests/slurm."""

import os

import pytest
import torch

from megakd.errors import ConfigError
from megakd.ranks import read_launch
from megakd.ranks.ranks import rank_device
from tests import forked
from tests.forked import free_port

PROGRAM = """
import sys, torch, torch.distributed as dist
from megakd.ranks import Ranks
with Ranks("cpu", rendezvous_seconds=60) as ranks:
    total = torch.ones(())
    dist.all_reduce(total)
    sys.stdout.write(f"rank {ranks.rank} of {int(total)}\\n")
"""


def task(rank: int, **more: str) -> dict[str, str]:
    """What srun sets in a task of a step of 8 + 8 + 4 tasks on three of the job's four nodes."""
    node, local = divmod(rank, 8)
    return {
        "SLURM_JOB_ID": "412", "SLURM_STEP_ID": "3", "SLURM_NTASKS": "20", "SLURM_STEP_NUM_TASKS": "20",
        "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "gpu[009-010,017]",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node), **more,
    }  # fmt: skip


def test_tasks_of_srun_are_ranks():
    launches = [read_launch(task(rank)) for rank in range(20)]
    assert [launch.rank for launch in launches] == list(range(20))
    assert {launch.world_size for launch in launches} == {20}
    assert [launch.local_rank for launch in launches] == [*range(8), *range(8), *range(4)]
    assert [launch.local_world_size for launch in launches] == [8] * 16 + [4] * 4
    assert {launch.where for launch in launches} == {"gpu009:22887"}
    assert [launch.rank for launch in launches if launch.hosts_store] == [0]
    assert read_launch(task(3, SLURM_STEP_ID="4")).port != launches[3].port, "steps of a job at the same time"
    assert read_launch(task(3, SLURM_RESTART_COUNT="2")).attempt == 2
    assert read_launch(task(3, MASTER_ADDR="10.0.0.9", MASTER_PORT="7000")).where == "10.0.0.9:7000"
    assert read_launch(task(3, SLURM_STEP_NUM_NODES="1")).address == "127.0.0.1"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("gpu[007-012,020],login1", "gpu007"), ("a[3,5],b[1-2]", "a3"),
        ("rack[2-3]node[04-08]", "rack2node04"), ("dgx-a[1-2].site.example", "dgx-a1.site.example"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_step(nodes, host):
    assert read_launch(task(1, SLURM_STEP_NODELIST=nodes)).address == host


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"SLURM_STEP_NODELIST": ""}, "list of nodes is '', .*\nhint: set MASTER_ADDR"),
        ({"SLURM_STEP_NODELIST": "(null)"}, r"list of nodes is '\(null\)'"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"SLURM_HET_SIZE": "2"}, "heterogeneous job"),
    ],
)
def test_a_step_that_cannot_be_told_is_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        read_launch(task(1, **more))


def test_torchruns_that_do_not_belong_together_are_refused():
    ours = {
        "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1",
    }  # fmt: skip
    assert read_launch(ours).world_size == 8
    assert read_launch(task(0) | ours | {"SLURM_STEP_NUM_TASKS": "1"}).world_size == 8
    assert read_launch(task(0) | ours | {"SLURM_STEP_NUM_TASKS": "3", "GROUP_WORLD_SIZE": "3"}).world_size == 8
    with pytest.raises(ConfigError, match=r"(?s)srun has started 20 torchruns.*a launch with 1, .*torchrun --nnodes=3"):
        read_launch(task(0) | ours)


def test_a_gpu_for_each_task(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert rank_device("nccl", read_launch(task(3))) == torch.device("cuda", 0)
    monkeypatch.delenv("SLURM_GPUS_PER_TASK")
    with pytest.raises(ConfigError, match="rank 3 is local rank 3, but torch sees 1 GPU"):
        rank_device("nccl", read_launch(task(3)))


def test_two_tasks_of_srun_meet(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(PROGRAM)
    port = str(free_port())
    two = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = [forked.Forked(path, environment=os.environ | task(rank, MASTER_PORT=port, **two)) for rank in range(2)]
    try:
        said = [process.communicate(90) for process in tasks]
    finally:
        for process in tasks:
            process.kill()
    assert [out for out, _ in said] == ["rank 0 of 2\n", "rank 1 of 2\n"], said
