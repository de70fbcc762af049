"""Charts of metrics over steps, tokens and seconds: curves as SVG, everything with letters as HTML around it.

The SVG is stretched to the size of its box, lines keep their width, and text keeps its size: a chart is legible at any
width of the page. Coordinates are thousandths of the box.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator

from megakd.reporting.lines import Lines, is_finite, named
from megakd.reporting.markup import Markup, tag
from megakd.reporting.quantities import Quantity, quantity, shown
from megakd.reporting.runs import Run
from megakd.reporting.scales import AXES, Scale, axis_ticks, value_scale
from megakd.reporting.settings import care

BUCKETS = 300  # columns of a curve with more points than two for each
DOTTED = 40  # a curve of at most so many points shows them
LABEL_GAP, LOWEST_LABEL = 0.075, 0.94  # of a chart's height: between labels at the ends of curves, and the last of them
MOST_LABELS = 13
MOST_LETTERS = 22
EARLY, LONG = 0.05, 200  # share of the steps that are the first ones; values that make a curve long
COLORS = 6
DRAWN = ("validation", "train")
REFERENCES = {("validation", "ce"): "teacher_ce"}
Point = tuple[float, float, float, float]  # where, mean, lowest, highest


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A metric of one run.

    Attributes:
        run: its number in the report.
        name: written at the curve's end.
        lines: where it was recorded.
        values: at every line, in the unit in which they are shown; None and what is not finite are no points.
        whole: all of them are finite.
        reference: drawn thin and dotted: what another curve is compared to.
    """

    run: int
    name: str
    lines: Lines
    values: list[float | None]
    whole: bool
    reference: bool

    @functools.cached_property
    def points(self) -> list[float]:
        return self.values if self.whole else [value for value in self.values if is_finite(value)]

    def segments(self, axis: str) -> Iterator[tuple[list[float], list[float]]]:
        """The unbroken pieces: a value that is not finite breaks the curve, a line without the metric does not."""
        if self.whole:
            yield self.lines.axes[axis], self.values
            return
        xs, ys = [], []
        for x, y in zip(self.lines.axes[axis], self.values, strict=True):
            if is_finite(y):
                xs.append(x)
                ys.append(y)
            elif y is not None and xs:
                yield xs, ys
                xs, ys = [], []
        if xs:
            yield xs, ys


class Charts:
    """Draws the charts of a report's runs."""

    def __init__(self, runs: list[Run]):
        self.runs = runs
        axes = [lines.axes for run in runs for kind, lines in run.lines.items() if kind in DRAWN]
        places = {axis: [found[axis][-1] for found in axes if axis in found] for axis in AXES}
        self.ends = {axis: max(last, default=0.0) or 1.0 for axis, last in places.items()}

    def curves(self, kind: str, key: str, *, reference: bool = False) -> list[Curve]:
        """One for each run that has the metric."""
        factor, found = quantity(key).factor, []
        for i, run in enumerate(self.runs):
            lines = run.of(kind)
            if (values := lines.columns.get(key)) is None:
                continue
            if factor != 1:
                values = [None if value is None else value * factor for value in values]
            found.append(Curve(i, run.name, lines, values, key in lines.finite, reference))
        return found

    def chart(self, kind: str, key: str) -> Markup:
        """One metric of all runs, with what has to be known when they are compared."""
        known, curves, different = quantity(key), self.curves(kind, key), care(self.runs, kind, key)
        other = REFERENCES.get((kind, key))
        references = self.curves(kind, other, reference=True) if other else []
        scale, begins = self.scale(curves, references, known)
        remarks = [f"begins above, at {shown(key, begins / known.factor)}"] if begins is not None else []
        remarks += [f"dotted: {quantity(other).title}"] if references else []
        absent = [run.name for i, run in enumerate(self.runs) if i not in {curve.run for curve in curves}]
        remarks += [f"not measured: {', '.join(absent)}"] if absent else []
        verb = "differs" if len(different) == 1 else "differ"
        remarks += [f"compare with care: {', '.join(different)} {verb}"] if different else []
        unit = ", ".join(filter(None, [known.unit, "log" if scale.log else ""]))
        return tag(
            "figure",
            tag("figcaption", tag("b", known.title), tag("span", unit), *(tag("small", r) for r in remarks)),
            *(self.plot(axis, references + curves, scale, describe(key, curves)) for axis in AXES),
            class_="chart",
            data_kind=kind,
            data_key=key,
            data_low=f"{scale.low:.6g}",
            data_high=f"{scale.high:.6g}",
            data_log=scale.log,
            data_factor=f"{known.factor:g}",
            data_unit=known.unit or None,
        )

    def scale(self, curves: list[Curve], references: list[Curve], known: Quantity) -> tuple[Scale, float | None]:
        """The vertical axis, and where the highest curve begins if that is above it.

        What is to fall begins high: where the first steps alone would take most of the chart, it shows what is after
        them.
        """
        all_of_them = [value for curve in curves + references for value in curve.points]
        whole, first = value_scale(all_of_them, known), EARLY * self.ends["step"]
        late = [
            value
            for curve in curves
            for step, value in zip(curve.lines.steps, curve.values, strict=True)
            if step > first and is_finite(value)
        ]
        if known.better != "lower" or whole.log or len(late) < LONG:
            return whole, None
        after = value_scale(late, known)
        room = after.high - after.low
        if max(all_of_them) < after.high + room:
            return whole, None
        return Scale(min(after.low, *all_of_them), after.high + room / 2), max(all_of_them)

    def plot(self, axis: str, curves: list[Curve], scale: Scale, description: str) -> Markup:
        """The box of one chart on one horizontal axis; one of three is seen."""
        here = [curve for curve in curves if axis in curve.lines.axes and curve.points]
        end = self.ends[axis]
        if not here:
            text = f"{AXES[axis]}: not measured" if any(curve.points for curve in curves) else "no finite value"
            return tag("div", tag("p", text, class_="absent"), class_=f"plot by-{axis}")
        across, up = axis_ticks(axis, end), scale.ticks()
        grid = "".join(f"M0 {1000 - 1000 * place:.0f}H1000" for place, _ in up.places)
        paths = [[thin(xs, ys, end) for xs, ys in curve.segments(axis)] for curve in here]
        drawing = tag(
            "svg",
            tag("path", class_="grid", d=grid),
            *(draw(curve, path, axis, end, scale) for curve, path in zip(here, paths, strict=True)),
            viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
            role="img",
            aria_label=description,
        )
        texts = [tag("span", text, class_="y", style=f"top:{100 - 100 * p:.1f}%") for p, text in up.places]
        texts += [tag("span", text, class_="x", style=f"left:{100 * p:.1f}%") for p, text in across.places]
        texts.append(tag("span", across.unit, class_="unit"))
        lasts = {curve: path[-1][-1][1] for curve, path in zip(here, paths, strict=True) if not curve.reference}
        return tag("div", drawing, *texts, *ends(lasts, scale), class_=f"plot by-{axis}", data_axis=axis, data_end=end)


def describe(key: str, curves: list[Curve]) -> str:
    """What a screen reader says of a chart: first and last values."""
    factor, texts = quantity(key).factor, []
    for curve in curves:
        if points := curve.points:
            texts.append(f"{curve.name} from {shown(key, points[0] / factor)} to {shown(key, points[-1] / factor)}")
    return f"{quantity(key).title}: {'; '.join(texts)}"


def color(run: int) -> str:
    """Classes of a run's elements: its number, colour and, when colours come around again, kind of line."""
    return f"run-{run} c{run % COLORS} d{run // COLORS % 4}"


def draw(curve: Curve, paths: list[list[Point]], axis: str, end: float, scale: Scale) -> Markup:
    """The lines of a curve, a band around them where several points share a column, and marks where it breaks."""
    lines, bands = [], []
    for path in paths:
        lines.append(outline([(x, mean) for x, mean, _, _ in path], end, scale) + ("h0" if len(path) == 1 else ""))
        if any(low < high for _, _, low, high in path):
            around = [(x, high) for x, _, _, high in path] + [(x, low) for x, _, low, _ in reversed(path)]
            bands.append(outline(around, end, scale) + "z")
    children = [tag("path", class_="band", d="".join(bands))] if bands else []
    children.append(tag("path", class_="line", d="".join(lines)))
    if len(curve.points) <= DOTTED and not curve.reference:
        dots = [outline([(x, mean)], end, scale) + "h0" for path in paths for x, mean, _, _ in path]
        children.append(tag("path", class_="dots", d="".join(dots)))
    if not curve.whole:
        children += broken(curve, axis, end)
    return tag("g", *children, class_=color(curve.run) + (" reference" if curve.reference else ""))


def outline(points: list[tuple[float, float]], end: float, scale: Scale) -> str:
    """A path through points, in thousandths of the box."""
    across = 1000 / end
    return "M" + " ".join(f"{x * across:.1f},{1000 - 1000 * scale.place(y):.1f}" for x, y in points)


def broken(curve: Curve, axis: str, end: float) -> list[Markup]:
    """Marks at the top of the box where values are not finite."""
    rows = [i for i, value in enumerate(curve.values) if value is not None and not math.isfinite(value)]
    if not rows:
        return []
    marks = "".join(f"M{1000 * curve.lines.axes[axis][i] / end:.1f},0v45" for i in rows[:BUCKETS])
    where = named("step", [curve.lines.steps[i] for i in rows])
    return [tag("path", tag("title", f"{curve.name}: not finite at {where}"), class_="broken", d=marks)]


def thin(xs: list[float], ys: list[float], end: float) -> list[Point]:
    """(x, mean, lowest, highest) of the points, or of those in each of BUCKETS columns where there are many.

    It begins at the first point's place and ends at the last one's, as the run did.
    """
    if len(xs) <= 2 * BUCKETS:
        return [(x, y, y, y) for x, y in zip(xs, ys, strict=True)]
    cuts = [bisect.bisect_left(xs, end * i / BUCKETS) for i in range(1, BUCKETS)]
    path = []
    for start, stop in zip([0, *cuts], [*cuts, len(xs)], strict=True):
        if start < stop:
            part = ys[start:stop]
            path.append(((xs[start] + xs[stop - 1]) / 2, math.fsum(part) / len(part), min(part), max(part)))
    return [(xs[0], *path[0][1:]), *path[1:-1], (xs[-1], *path[-1][1:])] if len(path) > 1 else path


def ends(lasts: dict[Curve, float], scale: Scale) -> list[Markup]:
    """Names beside the ends of curves, moved apart where they would overlap; none where there is no room for all.

    Args:
        lasts: the curves and the heights at which they end.
    """
    if len(lasts) > MOST_LABELS:
        return []
    order = sorted(lasts, key=lasts.get, reverse=True)
    tops = spread([1 - scale.place(lasts[curve]) for curve in order], LABEL_GAP, LOWEST_LABEL)
    return [
        tag("span", tag("i"), short(c.name), class_=f"end {color(c.run)}", style=f"top:{100 * top:.1f}%")
        for top, c in zip(tops, order, strict=True)
    ]


def short(name: str) -> str:
    """A name of at most MOST_LETTERS letters, with its beginning and its end."""
    if len(name) <= MOST_LETTERS:
        return name
    return f"{name[: MOST_LETTERS // 2]}…{name[-(MOST_LETTERS // 2 - 1) :]}"


def spread(tops: list[float], gap: float, lowest: float) -> list[float]:
    """Ascending places with at least `gap` between neighbours, none beyond `lowest`, near to where they were."""
    placed = []
    for top in tops:
        placed.append(max(top, placed[-1] + gap) if placed else top)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], lowest)
        lowest = placed[i] - gap
    return placed
