"""What differs first between two records of one step, in the order of computation.

ids -> labels -> the teacher's targets -> the student's losses of every token -> gradient norms of every parameter. What
differs early makes the rest differ: the first stage that does is where to look.
"""

import dataclasses
import math
import sys

import numpy as np

from megakd.steps.tokens import Joined, excess, join_tokens, target_excess
from megakd.steps.whole import WholeStep

MOST_LINES = 5
MEAN_SHARE = 0.1  # of the tolerance of one token: errors of rounding have no common sign, a fault has
SMALL_SHARE = 0.01  # of the whole gradient's tolerance: what a parameter's norm may be off whatever its size
STAGES = {
    "ids": "ids",
    "labels": "labels",
    "targets": "teacher's targets",
    "losses": "student's losses",
    "gradients": "gradient norms",
}


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What rounding may do.

    Attributes:
        targets: log-probabilities of the teacher, nats; of a value x, this much times max(1, |x|).
        losses: losses of a token, likewise; their mean over the batch may be off by MEAN_SHARE of it.
        gradients: of a parameter's norm, relative.
    """

    targets: float
    losses: float
    gradients: float


TOLERANCES = {"fp32": Tolerance(1e-3, 1e-3, 1e-3), "bf16": Tolerance(0.25, 0.25, 0.1)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of value, compared.

    Attributes:
        name: a key of STAGES.
        differs: whether something is not within the tolerance.
        summary: how much was compared, how much of it differs, and the largest difference.
        lines: the worst of what differs, in words.
    """

    name: str
    differs: bool
    summary: str
    lines: list[str]


def compare(a: WholeStep, b: WholeStep, tolerance: Tolerance) -> list[Stage]:
    """All stages in the order of computation.

    Args:
        a: the recorded step.
        b: the replayed one.
    """
    ids, a_samples, b_samples = compare_ids(a, b)
    labels = compare_labels(a, b, a_samples, b_samples)
    joined = join_tokens(a, b, a_samples, b_samples)
    stages = [
        ids,
        labels,
        compare_targets(joined, tolerance.targets),
        compare_losses(joined, tolerance.losses),
        compare_gradients(a.norms, b.norms, tolerance.gradients),
    ]
    return [with_conflicts(stage, a, b) for stage in stages]


def with_conflicts(stage: Stage, a: WholeStep, b: WholeStep) -> Stage:
    """The stage with what a launch's own ranks do not have alike, which comes first."""
    lines = [f"{whose}: {conflict.text}" for whose, step in (("in the record", a), ("in the replay", b))
             for conflict in step.conflicts if conflict.stage == stage.name]  # fmt: skip
    if not lines:
        return stage
    lines = lines[:MOST_LINES] + ([f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else [])
    summary = f"ranks of one launch do not agree; {stage.summary}"
    return dataclasses.replace(stage, differs=True, summary=summary, lines=lines + stage.lines)


def compare_ids(a: WholeStep, b: WholeStep) -> tuple[Stage, np.ndarray, np.ndarray]:
    """The stage, and the numbers of the samples in both, pair by pair, that have the same length."""
    a_keys, b_keys = (s.samples["place"].astype(np.int64) << 31 | s.samples["part"] for s in (a, b))
    _, a_at, b_at = np.intersect1d(a_keys, b_keys, assume_unique=True, return_indices=True)
    lines = [
        f"{step.name(int(n))}: not in the {other}"
        for step, at, other in ((a, a_at, "replay"), (b, b_at, "record"))
        for n in np.setdiff1d(np.arange(len(step.start_N)), at)
    ]
    same_length = a.samples["length"][a_at] == b.samples["length"][b_at]
    for n, m, same in zip(a_at.tolist(), b_at.tolist(), same_length, strict=True):
        if not same:
            lines.append(f"{a.name(n)}: {a.samples['length'][n]} ids -> {b.samples['length'][m]}")
        elif text := first_change(a.ids_of(n), b.ids_of(m), "id"):
            lines.append(f"{a.name(n)}{text}")
    summary = f"{len(a.start_N):,} samples, {len(a.ids_L):,} ids"
    found = stage("ids", len(lines), f"{summary}; {len(lines):,} samples differ", summary, lines)
    return found, a_at[same_length], b_at[same_length]


def compare_labels(a: WholeStep, b: WholeStep, a_samples: np.ndarray, b_samples: np.ndarray) -> Stage:
    lines = []
    for n, m in zip(a_samples.tolist(), b_samples.tolist(), strict=True):
        if text := first_change(a.labels_of(n), b.labels_of(m), "label"):
            lines.append(f"{a.name(n)}{text}")
    summary = f"{len(a.sample_T):,} supervised tokens"
    return stage("labels", len(lines), f"{summary}; {len(lines):,} samples differ", summary, lines)


def first_change(a: np.ndarray, b: np.ndarray, word: str) -> str | None:
    """Where two arrays of one length differ first, and how often; None where they do not."""
    at = np.flatnonzero(a != b)
    if not len(at):
        return None
    more = f"; {len(at)} of its {len(a)} {word}s differ" if len(at) > 1 else ""
    return f", position {at[0]}: {word} {a[at[0]]} -> {b[at[0]]}{more}"


def compare_targets(joined: Joined, tolerance: float) -> Stage:
    if not (len(joined.a.token_M) or len(joined.b.token_M)):
        return Stage("targets", False, "no teacher", [])
    over_J, words = target_excess(joined, tolerance)
    worst = np.argsort(-over_J, kind="stable")[:MOST_LINES]
    lines = [f"{joined.where(j)}: {words[j]}" for j in worst.tolist() if over_J[j] > 1]
    return token_stage("targets", over_J, tolerance, lines)


def compare_losses(joined: Joined, tolerance: float) -> Stage:
    pairs = {name: joined.pair(name) for name in ("loss", "kd", "ce")}
    over_J = np.zeros(len(joined.a_J))
    for x, y in pairs.values():
        np.maximum(over_J, excess(x, y, tolerance), out=over_J)
    worst = np.argsort(-over_J, kind="stable")[:MOST_LINES]
    lines = [f"{joined.where(j)}: " + ", ".join(f"{name} {x[j]:.5f} -> {y[j]:.5f}" for name, (x, y) in pairs.items())
             for j in worst.tolist() if over_J[j] > 1]  # fmt: skip
    means = {name: (float(x.mean()), float(y.mean())) for name, (x, y) in pairs.items() if len(x)}
    shifted = {name: (x, y) for name, (x, y) in means.items()
               if not abs(y - x) <= tolerance * MEAN_SHARE * max(1.0, abs(x))}  # fmt: skip
    lines = [f"the mean {name} of all tokens: {x:.6f} -> {y:.6f}" for name, (x, y) in shifted.items()] + lines
    found = token_stage("losses", over_J, tolerance, lines)
    return dataclasses.replace(found, differs=found.differs or bool(shifted))


def token_stage(name: str, over_J: np.ndarray, tolerance: float, lines: list[str]) -> Stage:
    """A stage of values per token; `over_J`: differences over what is allowed."""
    differing, largest = int((over_J > 1).sum()), tolerance * float(over_J.max(initial=0.0))
    summary = f"{len(over_J):,} tokens; the largest difference is {largest:.2g} (allowed: {tolerance:g})"
    return stage(name, differing, f"{differing:,} of {summary}", summary, lines)


def compare_gradients(a: dict[str, float], b: dict[str, float], tolerance: float) -> Stage:
    """Norms parameter by parameter: relative to the larger one, or to the whole gradient where they are tiny."""
    lines = [f"{name}: not in the replay" for name in sorted(a.keys() - b.keys())]
    lines += [f"{name}: not in the record" for name in sorted(b.keys() - a.keys())]
    whole_a, whole_b = (math.hypot(*norms.values()) for norms in (a, b))
    small = max(SMALL_SHARE * max(whole_a, whole_b), sys.float_info.min)
    over = {
        name: abs(a[name] - b[name]) / (tolerance * max(a[name], b[name], small))
        for name in sorted(a.keys() & b.keys())
    }
    worst = [name for name in sorted(over, key=lambda name: -over[name]) if over[name] > 1]
    differing = len(lines) + len(worst)
    for name in worst:
        factor = f" (x {b[name] / a[name]:.4g})" if a[name] else ""
        lines.append(f"{name}: {a[name]:.6g} -> {b[name]:.6g}{factor}")
    largest = tolerance * max(over.values(), default=0.0)
    summary = (
        f"{len(a):,} parameters; the largest relative difference is {largest:.2g} (allowed: {tolerance:g}); "
        f"of the whole gradient {whole_a:.6g} -> {whole_b:.6g}"
    )
    return stage("gradients", differing, f"{differing:,} of {summary}", summary, lines)


def stage(name: str, differing: int, found: str, equal: str, lines: list[str]) -> Stage:
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES:,} more"]
    return Stage(name, differing > 0, found if differing else equal, lines)
