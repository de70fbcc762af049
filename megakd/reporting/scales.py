"""Where numbers come to stand: ranges of axes, and ticks that are round."""

import dataclasses
import math

from megakd.reporting.quantities import Quantity, scientific, time_unit

AXES = {"step": "steps", "tokens": "supervised tokens", "seconds": "time of training"}
LEAST_SPAN = 0.01  # of the values, on a linear axis


@dataclasses.dataclass(frozen=True)
class Ticks:
    """Round numbers of an axis: where (0 to 1), what is written, and the unit of all of them."""

    places: list[tuple[float, str]]
    unit: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; logarithmic ones take positive numbers."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6, unit: str = "") -> Ticks:
        values = log_steps(self.low, self.high, most) if self.log else even_steps(self.low, self.high, most)
        return Ticks([(self.place(value), text) for value, text in zip(values, labels(values), strict=True)], unit)


def value_scale(values: list[float], known: Quantity) -> Scale:
    """The vertical axis for all values of a chart, in the unit in which they are shown."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high >= known.log_from * low:
        return Scale(low / 1.2, high * 1.2, log=True)
    if known.from_zero and low >= 0:
        return Scale(0.0, high * 1.06 or 1.0)
    middle, least = (low + high) / 2, max(abs(low), abs(high)) * LEAST_SPAN or 1.0
    if high - low < least:  # rounding, seen from too near, would look like a difference
        low, high = middle - least / 2, middle + least / 2
    margin = (high - low) * 0.06
    return Scale(low - margin, high + margin)


def axis_ticks(axis: str, end: float) -> Ticks:
    """Ticks from 0 to `end` of a horizontal axis; a time has the unit that suits it."""
    if axis != "seconds":
        return Scale(0.0, end).ticks(unit=axis if axis == "tokens" else "steps")
    unit, size = time_unit(end)
    return Scale(0.0, end / size).ticks(unit=unit)


def even_steps(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten; fewer than `most` of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_steps(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, thinned out where there are too many; with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, -(-(last - first) // most)) if len(factors) == 1 else 1
    values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [value for value in values if low <= value <= high]


def labels(values: list[float]) -> list[str]:
    """Texts of ticks: as many digits as tell neighbours apart, thousands and more by letter."""
    largest = max(map(abs, values), default=0.0)
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if largest >= power:
            size = 1e3 if letter == "k" else power
            return [f"{value / size:.6g}{letter}" if value else "0" for value in values]
    if largest < 1e-3:
        return [scientific(value, 6) for value in values]
    return [f"{value:.6g}" for value in values]
