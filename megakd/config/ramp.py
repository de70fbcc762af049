"""How a number of the loss section moves over the run: a pure function of the step, so resuming needs no state."""

import math
from collections.abc import Iterator
from typing import Literal

from megakd.config.section import Count, CountOrZero, NotNegative, Section


class Ramp(Section):
    """From the section's own value (at the first step) to `to`"""

    to: NotNegative
    """Value at the end of the ramp and after it."""
    kind: Literal["linear", "cosine", "wsd"] = "linear"
    """Shape; wsd (warm-up, stable, decay) grows from 0, stays at the section's value, and falls at the end."""
    steps: Count
    """Optimizer step at which `to` is reached."""
    warmup_steps: CountOrZero = 0
    """Steps of linear growth from 0 (wsd only)."""
    decay_steps: Count | None = None
    """Steps of the linear change to `to` at the end (wsd only, and needed there)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.kind == "wsd" and self.decay_steps is None:
            yield "decay_steps", "missing; kind wsd needs it"
        if self.kind != "wsd" and (self.decay_steps is not None or self.warmup_steps):
            yield "kind", f"{self.kind} takes neither warmup_steps nor decay_steps; expected wsd"
        decay, warmup = self.decay_steps, self.warmup_steps
        if decay is not None and warmup + decay > self.steps:
            yield "decay_steps", f"{decay} and warmup_steps = {warmup} exceed steps = {self.steps}"

    def value(self, start: float, step: int) -> float:
        """The number at an optimizer step.

        Args:
            start: the section's value.
            step: 1 is the first.
        """
        if step >= self.steps:
            return self.to
        if self.kind == "wsd":
            left = self.steps - step
            if left < self.decay_steps:
                return self.to + (start - self.to) * left / self.decay_steps
            return start * min(step / self.warmup_steps, 1.0) if self.warmup_steps else start
        done = (step - 1) / (self.steps - 1)
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + (self.to - start) * done
