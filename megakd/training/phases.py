"""Where the seconds of a step go: each of them in one phase, so that the phases sum to the step.

Nothing waits for the device on their account. Of teacher and student, whose work the host only queues, CUDA's own clock
tells the seconds; the step's sums and its gradient norm, which the host waits for, come after them. All else is the
host's time: the device ends the optimizer's update while the next step begins, and that is counted there, as `other`.
"""

import contextlib
import math
import time
from collections.abc import Iterator

from megakd.training.stragglers import now

ON_DEVICE = ("teacher", "student")
ALWAYS = ("data", "student", "optimizer", "save")  # what every step has; 0 s of saving are measured, too


class Phases:
    """The phases of one step after the other: `start`, `begin` of each phase, `read`."""

    def __init__(self):
        self._marks, self._steps = [], 0
        self._aside: dict[str, float] = {}

    def start(self) -> None:
        """A step begins."""
        self._marks = []
        self._steps += 1
        self.begin("other")

    def begin(self, name: str) -> None:
        """The phase before ends here, and this one begins."""
        self._marks.append((name, time.perf_counter(), now()))

    def saving(self) -> contextlib.AbstractContextManager:
        """Between two steps something is saved."""
        return self.aside("save")

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """What is done between two steps: shown in the next line, spread over the steps since the one before."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside[name] = self._aside.get(name, 0.0) + time.perf_counter() - began

    def read(self, *, last: bool) -> dict[str, float]:
        """`NAME_seconds` of every phase of the step that ends here, `other_seconds`, and `seconds`, their sum.

        Args:
            last: a line is made of it, and what is saved from now on belongs to the next one.
        """
        self.begin("end")
        aside = {name: seconds / self._steps for name, seconds in self._aside.items()}
        if last:
            self._aside, self._steps = dict.fromkeys(self._aside, 0.0), 0
        found = dict.fromkeys(ALWAYS, 0.0)
        for (name, began, mark), (_, ended, end_mark) in zip(self._marks, self._marks[1:], strict=False):
            on_device = name in ON_DEVICE and not isinstance(mark, float)
            seconds = mark.elapsed_time(end_mark) / 1000 if on_device else ended - began
            found[name] = found.get(name, 0.0) + seconds
        for name, seconds in aside.items():
            found[name] = found.get(name, 0.0) + seconds
        del found["other"]
        whole = self._marks[-1][1] - self._marks[0][1] + math.fsum(aside.values())
        found["other"] = whole - math.fsum(found.values())
        return {f"{name}_seconds": seconds for name, seconds in found.items()} | {"seconds": whole}
