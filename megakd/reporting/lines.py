"""The lines of metrics.jsonl as columns of numbers, whatever state the file is in."""

import dataclasses
import itertools
import json
import math

from megakd.reporting.clock import axes_of

MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines of one kind (`train`, `validation`, ...) by ascending step.

    Attributes:
        steps: of every line.
        columns: metric to its numbers at every line, finite or not; None where a line has none.
        axes: `step`, and where they were measured `tokens` and `seconds`: where every line stands on them.
        finite: metrics with a finite number at every line.
    """

    steps: list[int]
    columns: dict[str, list[float | None]]
    axes: dict[str, list[float]]
    finite: frozenset[str]

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it is a finite number; none for a metric that is not there."""
        values = self.columns.get(key, [])
        if key in self.finite or not values:
            return self.steps if values else [], values
        known = [(step, value) for step, value in zip(self.steps, values, strict=True) if is_finite(value)]
        return [step for step, _ in known], [value for _, value in known]


NO_LINES = Lines([], {}, {}, frozenset())


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number_of(value) -> float | None:
    """A number of JSON, finite or not; None for what is none, infinity for what no float can hold."""
    if type(value) is int:
        try:
            float(value)
        except OverflowError:
            return math.inf
    return value if type(value) in (int, float) else None


def parse_lines(content: bytes, file: str, notes: list[str]) -> list[dict]:
    """The JSON objects of a file's lines; a last line that was cut off and damaged ones go to the notes."""
    found, damaged = [], []
    rows = content.split(b"\n")
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = json.loads(row.decode("utf-8"))
        except (ValueError, RecursionError):  # ValueError: of UTF-8 and of JSON
            line = None
        if isinstance(line, dict):
            found.append(line)
        elif number == len(rows):
            notes.append(f"the last line of {file} was cut off: left out")
        else:
            damaged.append(number)
    if damaged:
        notes.append(f"{file}: {named('line', damaged)} cannot be read: left out")
    return found


def by_kind(found: list[dict], file: str, notes: list[str]) -> dict[str, Lines]:
    """Lines of every kind by ascending step; of two lines of one step the later one."""
    kinds: dict[str, dict[int, dict]] = {}
    nameless, again = 0, 0
    for line in found:
        kind, step = line.get("kind"), line.get("step")
        if type(kind) is not str or type(step) is not int or not 0 <= step < 1 << 62:
            nameless += 1
            continue
        lines = kinds.setdefault(kind, {})
        again += step in lines
        lines[step] = line
    if nameless:
        notes.append(f"{count(nameless, 'line')} of {file} without a kind or a step: left out")
    if again:
        notes.append(f"{count(again, 'line')} of {file} of a step that was there before: the later one counts")
    rows = {kind: [lines[step] for step in sorted(lines)] for kind, lines in kinds.items()}
    columns = {kind: columns_of(lines) for kind, lines in rows.items()}
    steps = {kind: [line["step"] for line in lines] for kind, lines in rows.items()}
    axes = {kind: axes_of(steps[kind], steps.get("train", []), columns.get("train", {})) for kind in rows}
    for kind, values in columns.items():
        notes += non_finite(kind, steps[kind], values)
    return {kind: Lines(steps[kind], values, axes[kind], all_finite(values)) for kind, values in columns.items()}


def columns_of(lines: list[dict]) -> dict[str, list[float | None]]:
    """Every name that has a number in some line, in the order in which they turn up; without `step`."""
    columns = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(lines)):
        values = [line.get(key) for line in lines]
        if not set(map(type, values)) <= {float}:
            values = [number_of(value) for value in values]
        if key != "step" and any(value is not None for value in values):
            columns[key] = values
    return columns


def all_finite(columns: dict[str, list[float | None]]) -> frozenset[str]:
    return frozenset(key for key, values in columns.items() if None not in values and all(map(math.isfinite, values)))


def non_finite(kind: str, steps: list[int], columns: dict[str, list[float | None]]) -> list[str]:
    """One note for each metric with values that are no finite numbers."""
    found = []
    for key, values in columns.items():
        at = [s for s, value in zip(steps, values, strict=True) if value is not None and not math.isfinite(value)]
        found += [f"{kind} {key} is not finite at {named('step', at)}"] if at else []
    return found


def named(word: str, numbers: list[int]) -> str:
    """`step 3`, `steps 3, 4`, `steps 3, 4, 5, 6, 7 and 12 others`."""
    listed = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} others" if len(numbers) > MOST_NAMED else ""
    return f"{word}{'s' if len(numbers) > 1 else ''} {listed}{more}"


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number > 1 else ''}"
