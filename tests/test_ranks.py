"""The pool of ranks that other tests rely on: it must not swallow a failure, and must survive one."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def total(rank, ranks, x):
    y = torch.tensor([float(rank)])
    dist.all_reduce(y)
    return rank, ranks, x, y.item(), os.getpid()


def fail_on_one(rank, ranks):
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def die(rank, ranks):
    if rank == 0:
        os._exit(3)


def hang(rank, ranks):
    if rank == 1:
        time.sleep(60)


def test_ranks_are_kept_replaced_after_a_failure_and_ended():
    first, again = run_ranks(3, total, "a"), run_ranks(3, total, "b")
    assert [answer[:4] for answer in first] == [(rank, 3, "a", 3.0) for rank in range(3)]
    pids = [answer[4] for answer in first]
    assert pids == [answer[4] for answer in again] and os.getpid() not in pids
    with pytest.raises(RuntimeError, match=r"rank 1 of 3 failed(.|\n)*KeyError: 'the reason'"):
        run_ranks(3, fail_on_one)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(RuntimeError, match=r"rank 0 of 3 failed(.|\n)*the process died"):
        run_ranks(3, die)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not answer within 5 seconds"):
        run_ranks(3, hang, timeout_seconds=5)
