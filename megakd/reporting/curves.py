"""Charts of metrics over steps, tokens and seconds: curves as SVG, everything with letters as HTML around it.

The SVG is stretched to the size of its box, lines keep their width, and text keeps its size: a chart is legible at any
width of the page. Coordinates are thousandths of the box.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator

from megakd.reporting.markup import Markup, tag
from megakd.reporting.quantities import quantity, shown
from megakd.reporting.runs import Run, named
from megakd.reporting.scales import AXES, Scale, axis_ticks, positions, value_scale

BUCKETS = 300  # columns of a curve with more points than two for each
DOTTED = 40  # a curve of at most so many points shows them
LABEL_GAP = 0.075  # of a chart's height, between labels at the ends of curves
MOST_LABELS = 13
COLORS = 6
REFERENCES = {("validation", "ce"): "teacher_ce"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of one run.

    Attributes:
        run: its number in the report.
        name: written at the curve's end.
        axes: axis to the places of the values.
        values: in the unit in which they are shown; None and what is not finite are no points.
        reference: drawn thin and dotted: what another curve is compared to.
    """

    run: int
    name: str
    axes: dict[str, list[float]]
    values: list[float | None]
    reference: bool = False

    def points(self) -> list[float]:
        return [value for value in self.values if value is not None and math.isfinite(value)]


class Charts:
    """Draws the charts of a report's runs."""

    def __init__(self, runs: list[Run]):
        self.runs = runs
        self.axes = {(i, kind): positions(run, kind) for i, run in enumerate(runs) for kind in ("train", "validation")}
        self.ends = {
            axis: max((places[axis][-1] for places in self.axes.values() if places.get(axis)), default=0.0)
            for axis in AXES
        }

    def curves(self, kind: str, key: str, *, reference: bool = False) -> list[Curve]:
        """One for each run that has the metric."""
        factor = quantity(key).factor
        found = []
        for i, run in enumerate(self.runs):
            values = [None if value is None else value * factor for value in run.column(kind, key)]
            curve = Curve(i, run.name, self.axes[i, kind], values, reference)
            if any(value is not None for value in values):
                found.append(curve)
        return found

    def chart(self, kind: str, key: str, care: list[str]) -> Markup:
        """One metric of all runs.

        Args:
            care: settings that differ between the runs and change what the metric means.
        """
        known, curves = quantity(key), self.curves(kind, key)
        other = REFERENCES.get((kind, key))
        references = self.curves(kind, other, reference=True) if other else []
        scale = value_scale([value for curve in curves + references for value in curve.points()], known)
        remarks = [f"dotted: {quantity(other).title}"] if references else []
        absent = [run.name for i, run in enumerate(self.runs) if i not in {curve.run for curve in curves}]
        remarks += [f"not measured: {', '.join(absent)}"] if absent else []
        remarks += [f"compare with care: {', '.join(care)} differ{'s' if len(care) == 1 else ''}"] if care else []
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

    def plot(self, axis: str, curves: list[Curve], scale: Scale, description: str) -> Markup:
        """The box of one chart on one horizontal axis; one of three is seen."""
        here = [curve for curve in curves if axis in curve.axes and curve.points()]
        end = self.ends[axis]
        if not here or not end:
            text = f"{AXES[axis]}: not measured" if curves else "no finite value"
            return tag("div", tag("p", text, class_="absent"), class_=f"plot by-{axis}")
        across, up = axis_ticks(axis, end), scale.ticks()
        grid = "".join(f"M0 {1000 - 1000 * place:.0f}H1000" for place, _ in up.places)
        drawing = tag(
            "svg",
            tag("path", class_="grid", d=grid),
            *(draw(curve, axis, end, scale) for curve in here),
            viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
            role="img",
            aria_label=description,
        )
        texts = [tag("span", text, class_="y", style=f"top:{100 - 100 * p:.1f}%") for p, text in up.places]
        texts += [tag("span", text, class_="x", style=f"left:{100 * p:.1f}%") for p, text in across.places]
        texts.append(tag("span", across.unit, class_="unit"))
        mains = [curve for curve in here if not curve.reference]
        return tag("div", drawing, *texts, *ends(mains, scale), class_=f"plot by-{axis}", data_axis=axis, data_end=end)


def describe(key: str, curves: list[Curve]) -> str:
    """What a screen reader says of a chart: first and last values."""
    factor, texts = quantity(key).factor, []
    for curve in curves:
        if points := curve.points():
            texts.append(f"{curve.name} from {shown(key, points[0] / factor)} to {shown(key, points[-1] / factor)}")
    return f"{quantity(key).title}: {'; '.join(texts)}"


def color(run: int) -> str:
    """Classes of a run's elements: its number, colour and, when colours come around again, kind of line."""
    return f"run-{run} c{run % COLORS} d{run // COLORS % 4}"


def draw(curve: Curve, axis: str, end: float, scale: Scale) -> Markup:
    """The lines of a curve, a band around them where several points share a column, and crosses where it breaks."""
    lines, bands = [], []
    for xs, ys in segments(curve.axes[axis], curve.values):
        path = thin(xs, ys, end)
        across = [1000 * x / end for x, *_ in path]
        means, lows, highs = ([1000 - 1000 * scale.place(p[i]) for p in path] for i in (1, 2, 3))
        lines.append("M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, means, strict=True)))
        lines[-1] += "h0" if len(path) == 1 else ""
        if lows != highs:
            there = [f"{x:.1f},{y:.1f}" for x, y in zip(across, highs, strict=True)]
            back = [f"{x:.1f},{y:.1f}" for x, y in zip(reversed(across), reversed(lows), strict=True)]
            bands.append("M" + " ".join(there + back) + "z")
    children = [tag("path", class_="band", d="".join(bands))] if bands else []
    children.append(tag("path", class_="line", d="".join(lines)))
    if len(curve.points()) <= DOTTED and not curve.reference:
        dots = "".join(
            f"M{1000 * x / end:.1f},{1000 - 1000 * scale.place(y):.1f}h0"
            for xs, ys in segments(curve.axes[axis], curve.values)
            for x, y in zip(xs, ys, strict=True)
        )
        children.append(tag("path", class_="dots", d=dots))
    if broken := [i for i, y in enumerate(curve.values) if y is not None and not math.isfinite(y)]:
        marks = "".join(f"M{1000 * curve.axes[axis][i] / end:.1f},0v45" for i in broken[:BUCKETS])
        where = named("step", [int(curve.axes["step"][i]) for i in broken])
        children.append(tag("path", tag("title", f"{curve.name}: not finite at {where}"), class_="broken", d=marks))
    return tag("g", *children, class_=color(curve.run) + (" reference" if curve.reference else ""))


def segments(places: list[float], values: list[float | None]) -> Iterator[tuple[list[float], list[float]]]:
    """The unbroken pieces of a curve: a value that is not finite breaks it, a line without the metric does not."""
    xs, ys = [], []
    for x, y in zip(places, values, strict=True):
        if y is None:
            continue
        if math.isfinite(y):
            xs.append(x)
            ys.append(y)
        elif xs:
            yield xs, ys
            xs, ys = [], []
    if xs:
        yield xs, ys


def thin(xs: list[float], ys: list[float], end: float) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of the points, or of those in each of BUCKETS columns where there are many.

    The first and the last point are kept as they are, so that a curve begins and ends where the run did.
    """
    if len(xs) <= 2 * BUCKETS:
        return [(x, y, y, y) for x, y in zip(xs, ys, strict=True)]
    cuts = [bisect.bisect_left(xs, end * i / BUCKETS, 1, len(xs) - 1) for i in range(BUCKETS)] + [len(xs) - 1]
    path = [(xs[0], ys[0], ys[0], ys[0])]
    for start, stop in zip([1, *cuts], cuts, strict=False):
        if start < stop:
            part = ys[start:stop]
            path.append(((xs[start] + xs[stop - 1]) / 2, math.fsum(part) / len(part), min(part), max(part)))
    return [*path, (xs[-1], ys[-1], ys[-1], ys[-1])]


def ends(curves: list[Curve], scale: Scale) -> list[Markup]:
    """Names beside the ends of curves, moved apart where they would overlap; none where there is no room for all."""
    if len(curves) > MOST_LABELS:
        return []
    order = sorted((1 - scale.place(curve.points()[-1]), i) for i, curve in enumerate(curves))
    tops = spread([top for top, _ in order], LABEL_GAP)
    return [
        tag("span", tag("i"), curves[i].name, class_=f"end {color(curves[i].run)}", style=f"top:{100 * top:.1f}%")
        for top, (_, i) in zip(tops, order, strict=True)
    ]


def spread(tops: list[float], gap: float) -> list[float]:
    """Ascending places with at least `gap` between neighbours, within 0 to 1 and near to where they were."""
    placed = []
    for top in tops:
        placed.append(max(top, placed[-1] + gap) if placed else top)
    limit = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed
