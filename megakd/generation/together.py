"""Several models, data-parallel ranks of one another, that share a list of requests."""

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist

from megakd.generation.engine import Engine, Request, Sequence

ROUND_STEPS = 64  # of an engine, between two questions whether to stop


def write_together(
    engine: Engine, requests: list[Request], stopping: Callable[[], bool] = lambda: False
) -> list[Sequence] | None:
    """The finished sequences of all models, in any order, on every rank; None when asked to stop before.

    Each model takes every so many-th prompt, with all of its completions.

    Args:
        engine: this rank's.
        requests: the same on every rank; those of a prompt follow each other.
        stopping: asked again and again, on all ranks alike; True gives up.
    Collectives: those of the models; one all-reduce of 4 bytes after every 64 tokens of a sequence; at the end a gather
        of the pickled sequences over data-parallel ranks.
    """
    dp = engine.groups.dp
    prompts = [list(group) for _, group in itertools.groupby(requests, key=lambda request: request.prompt)]
    running = engine.run([request for group in prompts[dp.rank() :: dp.size()] for request in group])
    done: list[Sequence] = []
    while True:
        steps = list(itertools.islice(running, ROUND_STEPS))
        done += itertools.chain.from_iterable(steps)
        if stopping():
            running.close()
            return None
        if not anyone(len(steps) == ROUND_STEPS, engine.device):
            break
    everyone: list = [None] * dp.size()
    dist.all_gather_object(everyone, done, group=dp)
    return list(itertools.chain.from_iterable(everyone))


def anyone(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on some rank."""
    shared = torch.tensor(int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)
