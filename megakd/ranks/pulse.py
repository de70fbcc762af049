"""What a rank is doing, for how long, and how long that may take."""

import json
import os
import pathlib
import time
from collections.abc import Callable

# They repeat: the longest seen says how long one takes.
STEADY = frozenset({"data", "rollouts", "step", "validation", "record"})
LEAST_SECONDS = 120.0
TIMES_THE_LONGEST = 5.0


class Pulse:
    """Marked by the main thread whenever it begins something, read by the watch.

    A suspended machine or launch must not look stuck when it wakes up, so the watch adds up its own short turns
    instead of comparing clocks.

    Args:
        watchdog_seconds: how long a steady phase may take; None: 5 times the longest seen, and at least 120.

    Attributes:
        step, phase: where the main thread is; phase `preparation` until the first mark.
        marks: how many there were; a rank that is behind has fewer.
        still_seconds: since the last mark, while the watch was running.
        listener: called with the phase at every mark; None: nobody.
    """

    def __init__(self, watchdog_seconds: float | None = None):
        self.step, self.phase, self.marks, self.still_seconds = 0, "preparation", 0, 0.0
        self.listener: Callable[[str], None] | None = None
        self._longest: dict[str, float] = {}
        self._began, self._marks_seen, self._watchdog_seconds = time.monotonic(), 0, watchdog_seconds

    def mark(self, phase: str, step: int) -> None:
        """The main thread begins `phase` of `step`."""
        now = time.monotonic()
        if self.phase in STEADY:
            self._longest[self.phase] = max(self._longest.get(self.phase, 0.0), now - self._began)
        self.step, self.phase, self._began = step, phase, now
        self.marks += 1
        if self.listener is not None:
            self.listener(phase)

    def turn(self, seconds: float) -> None:
        """The watch has run for so long since its last turn."""
        self.still_seconds = self.still_seconds + seconds if self.marks == self._marks_seen else 0.0
        self._marks_seen = self.marks

    @property
    def limit_seconds(self) -> float | None:
        """How long the phase may take; None where that cannot be said: not steady, or never yet completed."""
        longest = self._longest.get(self.phase)
        if longest is None:
            return None
        if self._watchdog_seconds is not None:
            return self._watchdog_seconds
        return max(LEAST_SECONDS, TIMES_THE_LONGEST * longest)

    def describe(self) -> dict:
        """For the other ranks and for monitors."""
        return {
            "step": self.step,
            "phase": self.phase,
            "marks": self.marks,
            "still_seconds": round(self.still_seconds, 1),
            "limit_seconds": self.limit_seconds,
        }


def write_heartbeat(path: pathlib.Path, pulse: Pulse, **facts) -> None:
    """One JSON object for monitors outside, replaced whole; not synced, for it is worth nothing after a crash.

    Raises:
        OSError: the folder is not there or cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    line = json.dumps({"time": round(time.time(), 1)} | facts | pulse.describe())
    new.write_text(line + "\n", encoding="utf-8")
    os.replace(new, path)
