"""Who writes rollouts: the student itself, as many models side by side as there are data-parallel ranks."""

import itertools
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from megakd.assembly.setup import Setup
from megakd.generation.engine import Engine, Request, Sequence
from megakd.generation.mirror import Mirror
from megakd.generation.stops import Stops
from megakd.kernels.next_tokens import Choice

ROUND_STEPS = 64  # of the engine, between two questions whether to stop


class Writer(Protocol):
    """Anything that completes prompts with the student's present weights."""

    def write(self, requests: list[Request], step: int, stopping: Callable[[], bool]) -> list[Sequence] | None:
        """The finished sequences, in any order, on every rank.

        Args:
            requests: the same on every rank.
            step: optimizer steps that the weights have taken.
            stopping: asked again and again, on all ranks alike; True gives up, and None is returned.
        """


class StudentWriter:
    """The student, where it is trained.

    Args:
        setup: of the run.
        stops: what ends a completion.
    """

    def __init__(self, setup: Setup, stops: Stops):
        section, self.groups, self.device = setup.config.rollouts, setup.groups, setup.device
        self.mirror = Mirror(setup.student, setup.config, setup.groups, setup.tokenizer.vocab_size, setup.device)
        self.choice = Choice(section.temperature, section.top_k, section.top_p, section.min_p)
        self.stops, self.section, self.seed = stops, section, setup.config.run.seed

    def write(self, requests: list[Request], step: int, stopping: Callable[[], bool]) -> list[Sequence] | None:
        """As `Writer`. Each model takes every so many-th prompt, with all of its completions.

        Collectives: those of the models; one all-reduce of 4 bytes after every 64 tokens of a sequence; at the end a
            gather of the pickled sequences over data-parallel ranks.
        """
        dp = self.groups.dp
        prompts = [list(group) for _, group in itertools.groupby(requests, key=lambda request: request.prompt)]
        mine = [request for group in prompts[dp.rank() :: dp.size()] for request in group]
        engine = Engine(
            self.mirror.gpt(), self.groups, self.device, self.choice, self.stops,
            max_new_tokens=self.section.max_new_tokens, slots=self.section.concurrency, seed=self.seed,
        )  # fmt: skip
        running, done = engine.run(mine), []
        while True:
            rounds = list(itertools.islice(running, ROUND_STEPS))
            done += itertools.chain.from_iterable(rounds)
            if stopping():
                running.close()
                return None
            if not self._anyone(len(rounds) == ROUND_STEPS):
                break
        everyone: list = [None] * dp.size()
        dist.all_gather_object(everyone, done, group=dp)
        return list(itertools.chain.from_iterable(everyone))

    def _anyone(self, going_on: bool) -> bool:
        """Whether one of the models goes on."""
        flag = torch.tensor(int(going_on), dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
