"""Which prompts a step's completions answer: a pure function of (seed, step), the same for every layout and resume."""

import dataclasses

from megakd.data.order import permute

PROMPT_ORDER = 4  # keys of `permute`: 0 to 3 order samples, documents, packs and blends


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stream of completions that a run learns from, `samples` of them in each step.

    The completions of a prompt follow each other; every epoch asks each prompt once, in an order of its own.

    Attributes:
        prompts: how many there are.
        samples: completions of a step.
        n: completions of a prompt in one epoch.
        sync_every: steps that one state of the weights writes for.
        seed: of the run.
        steps: of the run.
    """

    prompts: int
    samples: int
    n: int
    sync_every: int
    seed: int
    steps: int

    def window(self, step: int) -> range:
        """The steps (the first is 0) whose completions are written together, before the first of them."""
        first = step - step % self.sync_every
        return range(first, min(first + self.sync_every, self.steps))

    def completions(self, step: int) -> list[tuple[int, int]]:
        """(which of the prompts, number of the completion) of a step; the number goes on from epoch to epoch."""
        found = []
        for place in range(step * self.samples, (step + 1) * self.samples):
            asked, completion = divmod(place, self.n)
            epoch, position = divmod(asked, self.prompts)
            prompt = int(permute(position, self.prompts, self.seed, epoch, PROMPT_ORDER)[0])
            found.append((prompt, epoch * self.n + completion))
        return found
