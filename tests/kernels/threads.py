"""Ranks as threads of one process: what is gathered goes through a list. Any number of them, in milliseconds."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megakd.kernels import VocabShard


@dataclass(frozen=True)
class ThreadShard(VocabShard):
    """A shard among `team.ranks` threads; collectives are in rank order, as those of a process group."""

    team: "Team" = None
    place: int = 0

    def __post_init__(self):
        pass

    @property
    def ranks(self):
        return self.team.ranks

    @property
    def rank(self):
        return self.place

    def all_gather(self, mine):
        return torch.stack(self.team.exchange(self.place, mine.detach().clone()))

    def start_sum_over_ranks(self, x_TH, *, scatter=False):
        total = self.all_gather(x_TH).sum(0)
        return lambda: total.chunk(self.ranks)[self.place] if scatter else x_TH.copy_(total)


class Team:
    """The threads that share a vocabulary."""

    def __init__(self, ranks):
        self.ranks, self.slots, self.barrier = ranks, [None] * ranks, threading.Barrier(ranks, timeout=60)

    def exchange(self, place, mine):
        self.slots[place] = mine
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


def run_threads(ranks, whole_TVs, fn, *, padding=3):
    """[fn(shard, *this rank's columns)] for each thread; the padding holds NaN. Raises what one of them raised."""
    team, size = Team(ranks), whole_TVs[0].shape[1]
    width = -(-(size + padding) // ranks)
    padded = [torch.nn.functional.pad(x, (0, width * ranks - size), value=torch.nan) for x in whole_TVs]

    def run(place):
        shard = ThreadShard(place * width, (place + 1) * width, size, None, team, place)
        try:
            return fn(shard, *(x[:, shard.start : shard.stop].clone() for x in padded))
        except BaseException:
            team.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, place) for place in range(ranks)]
    failures = [f.exception() for f in futures if f.exception() is not None]
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    return [f.result() for f in futures]
