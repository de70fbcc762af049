"""Reliability diagrams: how often the most likely token is right, over how sure the model is of it."""

import dataclasses
import math

from megakd.reporting.curves import color, ends
from megakd.reporting.lines import number_of
from megakd.reporting.markup import Markup, tag
from megakd.reporting.quantities import number
from megakd.reporting.runs import Run
from megakd.reporting.scales import Scale

UNIT = Scale(0.0, 1.0)
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
SMALLEST, LARGEST = 4.0, 16.0  # pixels of a bin's dot: of one token, and of all of them


@dataclasses.dataclass(frozen=True)
class Bins:
    """The bins of one evaluation of a run that hold a token, by ascending confidence.

    Attributes:
        run: its number in the report.
        name: written at the curve's end.
        points: (mean confidence, share that is right, tokens) of each bin.
    """

    run: int
    name: str
    points: tuple[tuple[float, float, float], ...]


def figures(runs: list[Run]) -> list[Markup]:
    """One diagram of the runs' last validations, and one of what `megakd evaluate` said last, where bins are there."""
    sources = {
        "last validation": [run.validations[-1:] for run in runs],
        "last megakd evaluate": [run.evaluations[-1:] for run in runs],
    }
    found = []
    for source, lines_of in sources.items():
        bins = [
            Bins(i, run.name, points_of(line))
            for i, (run, lines) in enumerate(zip(runs, lines_of, strict=True))
            for line in lines
        ]
        if bins := [one for one in bins if one.points]:
            found.append(diagram(source, bins))
    return found


def points_of(line: dict) -> tuple[tuple[float, float, float], ...]:
    """The bins of a line that hold a token; none where it has no bins, or what stands there cannot be bins."""
    value = line.get("calibration")
    columns = [value.get(name) for name in ("tokens", "confidence", "right")] if isinstance(value, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) != 1:
        return ()
    points = []
    for row in zip(*columns, strict=True):
        tokens, confidence, right = map(number_of, row)
        if None in (tokens, confidence, right) or not all(map(math.isfinite, (tokens, confidence, right))):
            return ()
        if tokens > 0:
            points.append((confidence / tokens, right / tokens, tokens))
    fits = all(-0.001 <= x <= 1.001 and -0.001 <= y <= 1.001 for x, y, _ in points)
    return tuple(sorted(points)) if fits else ()


def diagram(source: str, bins: list[Bins]) -> Markup:
    """Accuracy over confidence with the diagonal on which both are equal."""
    grid = "".join(f"M0 {1000 - 1000 * place:.0f}H1000" for place in TICKS)
    drawing = tag(
        "svg",
        tag("path", class_="grid", d=grid),
        tag("path", class_="grid", d="M0,1000L1000,0"),
        *map(draw, bins),
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"accuracy over confidence: {'; '.join(map(describe, bins))}",
    )
    texts = [tag("span", f"{p:.0%}", class_="y", style=f"top:{100 - 100 * p:.1f}%") for p in TICKS]
    texts += [tag("span", f"{p:.0%}", class_="x", style=f"left:{100 * p:.1f}%") for p in TICKS]
    lasts = {one: one.points[-1][1] for one in bins}
    caption = tag("figcaption", tag("b", "accuracy over confidence"), tag("small", source))
    return tag("figure", caption, tag("div", drawing, *texts, *ends(lasts, UNIT), class_="plot"), class_="chart")


def draw(bins: Bins) -> Markup:
    """A line through the bins, and a dot for each whose area is its share of the tokens."""
    all_tokens = math.fsum(tokens for _, _, tokens in bins.points)
    places = [f"{1000 * x:.1f},{1000 - 1000 * y:.1f}" for x, y, _ in bins.points]
    dots = []
    for place, (x, y, tokens) in zip(places, bins.points, strict=True):
        width = SMALLEST + (LARGEST - SMALLEST) * math.sqrt(tokens / all_tokens)
        text = f"{bins.name}: {x:.1%} sure, {y:.1%} right, {tokens:,.0f} tokens"
        dots.append(tag("path", tag("title", text), class_="dots", d=f"M{place}h0", style=f"stroke-width:{width:.1f}"))
    return tag("g", tag("path", class_="line", d="M" + " ".join(places)), *dots, class_=color(bins.run))


def describe(bins: Bins) -> str:
    tokens = math.fsum(n for _, _, n in bins.points)
    gap = math.fsum(abs(x - y) * n for x, y, n in bins.points) / tokens
    return f"{bins.name}, mean distance {gap:.2%} over {number(tokens)} tokens"
