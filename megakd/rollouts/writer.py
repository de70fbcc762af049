"""Who writes rollouts: the student itself, as many models side by side as there are data-parallel ranks."""

from collections.abc import Callable
from typing import Protocol

from megakd.assembly.setup import Setup
from megakd.generation.engine import Engine, Request, Sequence
from megakd.generation.mirror import Mirror
from megakd.generation.stops import Stops
from megakd.generation.together import write_together
from megakd.kernels.next_tokens import Choice


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
        mirror: the student as it generates.
    """

    def __init__(self, setup: Setup, stops: Stops, mirror: Mirror):
        section, self.groups, self.device = setup.config.rollouts, setup.groups, setup.device
        self.mirror = mirror
        self.choice = Choice(section.temperature, section.top_k, section.top_p, section.min_p)
        self.stops, self.section, self.seed = stops, section, setup.config.run.seed

    def write(self, requests: list[Request], step: int, stopping: Callable[[], bool]) -> list[Sequence] | None:
        """As `Writer`.

        Collectives: those of `write_together`.
        """
        engine = Engine(
            self.mirror.gpt(), self.groups, self.device, self.choice, self.stops,
            max_new_tokens=self.section.max_new_tokens, slots=self.section.concurrency, seed=self.seed,
        )  # fmt: skip
        return write_together(engine, requests, stopping)
