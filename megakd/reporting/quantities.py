"""What metrics mean: titles, units, whether less is better; and how numbers are written."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Quantity:
    """How a metric is shown.

    Attributes:
        title: its name in words.
        unit: of the value times `factor`.
        factor: what a recorded value is multiplied with.
        better: which end is the good one; empty where there is none.
        log_from: the axis is logarithmic where positive values span this factor.
        from_zero: a linear axis begins at 0.
    """

    title: str
    unit: str = ""
    factor: float = 1.0
    better: Literal["lower", "higher", ""] = ""
    log_from: float = math.inf
    from_zero: bool = False


KNOWN = {
    "loss": Quantity("objective", "nats", better="lower"),
    "ce": Quantity("cross-entropy", "nats", better="lower"),
    "kd": Quantity("divergence from the teacher", "nats", better="lower", log_from=100),
    "forward_kl": Quantity("KL from the teacher to the student", "nats", better="lower", log_from=100),
    "reverse_kl": Quantity("KL from the student to the teacher", "nats", better="lower", log_from=100),
    "bits_per_byte": Quantity("bits per byte", better="lower"),
    "top5_agreement": Quantity("the teacher's five likeliest in the student's", "%", 100, "higher"),
    "features": Quantity("feature loss", better="lower", log_from=100),
    "balance": Quantity("load balance of experts, 1 is even"),
    "router_z": Quantity("squared log-sum-exp of routers", log_from=100),
    "agreement": Quantity("top-1 agreement with the teacher", "%", 100, "higher"),
    "accuracy": Quantity("accuracy of the next token", "%", 100, "higher"),
    "perplexity": Quantity("perplexity", better="lower", log_from=20),
    "ece": Quantity("expected calibration error", "%", 100, "lower", from_zero=True),
    "teacher_ce": Quantity("teacher's cross-entropy", "nats"),
    "teacher_mass": Quantity("teacher's mass in its top K", "%", 100),
    "student_mass": Quantity("student's mass in the teacher's top K", "%", 100),
    "completion_tokens": Quantity("tokens of a completion"),
    "completions_ended": Quantity("completions that ended by themselves", "%", 100),
    "completions_staleness": Quantity("steps from the writer to what learns from it", from_zero=True),
    "writer_ce": Quantity("cross-entropy of the writer with what it wrote", "nats"),
    "grad_norm": Quantity("gradient norm", log_from=30),
    "lr": Quantity("learning rate", from_zero=True),
    "kd_weight": Quantity("weight of the divergence", from_zero=True),
    "ce_weight": Quantity("weight of the cross-entropy", from_zero=True),
    "temperature": Quantity("temperature", from_zero=True),
    "tokens_per_second": Quantity("supervised tokens a second", "tokens/s", from_zero=True),
    "tflops_per_rank": Quantity("model FLOP a second and rank", "TFLOP/s", from_zero=True),
    "peak_memory_bytes": Quantity("peak memory of a rank", "GB", 1e-9, from_zero=True),
    "slowest_over_median": Quantity("slowest rank over the median one", log_from=10),
    "seconds": Quantity("seconds of a step", "s", from_zero=True, log_from=10),
}


def quantity(key: str) -> Quantity:
    """How a metric is shown; one that is not known, by the ending of its name."""
    if key in KNOWN:
        return KNOWN[key]
    if "/" in key:  # of the tokens that one of several teachers teaches
        name, _, metric = key.rpartition("/")
        of_all = quantity(metric)
        return dataclasses.replace(of_all, title=f"{of_all.title}: {name}")
    if key.endswith("_seconds"):
        return Quantity(f"seconds: {phase(key)}", "s", from_zero=True, log_from=10)
    if key.endswith("_bytes"):
        return Quantity(words(key.removesuffix("_bytes")), "GB", 1e-9, from_zero=True)
    return Quantity(words(key), log_from=100)


def phase(key: str) -> str:
    return words(key.removesuffix("_seconds"))


def words(key: str) -> str:
    return key.replace("_", " ")


def shown(key: str, value: float | None) -> str:
    """A recorded value with its unit; `not measured` for None, for that is no 0."""
    if value is None:
        return "not measured"
    known = quantity(key)
    return with_unit(number(value * known.factor), known.unit)


def with_unit(text: str, unit: str) -> str:
    return f"{text} {unit}" if unit else text


def number(value: float) -> str:
    """About four significant digits: 4.468, 12,345, 1.23 M, 2.5e-4."""
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if size >= 1e5:
        return large(value)
    if size >= 1e3:
        return f"{value:,.0f}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return scientific(value, 2)


def scientific(value: float, digits: int) -> str:
    """`2.5e-4`, with at most so many digits after the point."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def large(value: float) -> str:
    for power, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= power:
            return f"{value / power:.4g}{letter}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """`42 s`, `12.5 min`, `3.4 h`, `2.1 d`."""
    unit, size = time_unit(seconds)
    return f"{seconds / size:.3g} {unit}"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a time, and its seconds."""
    units = (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800))
    return next(((unit, size) for unit, size, most in units if seconds < most), ("d", 86_400))
