"""The page: sections of charts and tables, and the recorded values that are shown under the pointer."""

import datetime
import json
import math

from megakd import __version__
from megakd.reporting import reliability, tables
from megakd.reporting.curves import Charts, color, short
from megakd.reporting.markup import Markup, join, printable, tag
from megakd.reporting.quantities import quantity
from megakd.reporting.runs import Run
from megakd.reporting.scales import AXES
from megakd.reporting.script import SCRIPT
from megakd.reporting.style import STYLE

ALONE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing is fetched
MOST_ROWS = 1000  # of a run and kind, for the pointer
RANKS = "slowest_over_median"
# Title, kind of line, metrics that are said to be missing where they are, and those that are not.
SECTIONS = (
    ("Held out", "validation", ("ce", "kd", "agreement", "accuracy"), ("loss", "features")),
    ("Training", "train", ("loss", "ce", "kd", "agreement"), ("features",)),
    ("Calibration", "validation", ("ece",), ()),
    ("Optimizer", "train", ("grad_norm", "lr"), ("kd_weight", "ce_weight", "temperature")),
    ("Teacher", "train", ("teacher_ce", "teacher_mass", "student_mass"), ()),
    (
        "Speed and memory",
        "train",
        ("tokens_per_second", "seconds"),
        ("tflops_per_rank", "peak_memory_bytes", "slowest_over_median"),
    ),
)
REMARKS = {
    "Calibration": "The error is the mean distance between the confidence in the most likely token and how often it is "
    "right. In the diagram a dot is a bin of confidences, larger where more tokens are; below the diagonal the model "
    "is surer than it is right.",
    "Optimizer": "The gradient norm is that before clipping.",
    "Teacher": "Over the training batches. Mass is the probability of the teacher's top K tokens.",
    "Speed and memory": "Bars: the mean step, without the first one logged.",
}
BESIDE = {("validation", "teacher_ce"), ("validation", "seconds")}  # shown in another chart or a table
AXIS_KEYS = ("tokens",)
COUNTED = {  # over the whole run; said among the notes when it is not 0
    "skipped": "batches without a supervised token were left out",
    "broken": "batches that broke a step were left out",
}


def page(runs: list[Run], made: datetime.datetime) -> str:
    """The whole HTML document; it asks nothing of any network.

    Args:
        made: written into it.
    """
    title = "megakd: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=ALONE),
        tag("title", title),
        tag("style", Markup(STYLE + rules(runs))),
    )
    return printable("<!doctype html>\n" + tag("html", head, body(runs, title, made), lang="en") + "\n")


def body(runs: list[Run], title: str, made: datetime.datetime) -> Markup:
    drawn = Charts(runs)
    parts = [
        tag("section", tables.facts(runs), notes(runs)),
        *chart_sections(runs, drawn),
        part("Final and best values", tables.finals(runs)),
        part("Settings that differ" if len(runs) > 1 else "Settings", tables.settings(runs)),
    ]
    return tag(
        "body",
        *switches(runs),
        tag("header", tag("h1", title), legend(runs)),
        tag("main", *parts),
        tag("footer", f"megakd {__version__}, {made:%Y-%m-%d %H:%M}. {how_to_read()}"),
        tag("div", id="tip", hidden=True),
        tag("script", data(runs), type="application/json", id="data"),
        tag("script", Markup(SCRIPT)),
    )


def part(title: str, content: Markup) -> Markup:
    return tag("section", tag("h2", title), content)


def how_to_read() -> str:
    return (
        "Where many steps share a column, the line is their mean and the band reaches from the lowest to the highest. "
        "A mark at the top: a value that is not finite. Time is that of training steps; steps that were not logged "
        "count as long as the next one that was."
    )


def switches(runs: list[Run]) -> list[Markup]:
    """The states of the page, kept in inputs before everything that they show or hide: no script is needed."""
    radios = [tag("input", type="radio", name="axis", id=f"by-{axis}", checked=axis == "step") for axis in AXES]
    boxes = [tag("input", type="checkbox", id=f"show-{i}", checked=True) for i in range(len(runs))]
    return radios + boxes


def rules(runs: list[Run]) -> str:
    """Rules for these runs: what their boxes hide, and room for the longest name at the end of a curve."""
    letters = max(len(short(run.name)) for run in runs)
    hidden = ",".join(f"#show-{i}:not(:checked)~main .charts .run-{i}" for i in range(len(runs)))
    faint = ",".join(f"#show-{i}:not(:checked)~header label[for=show-{i}]" for i in range(len(runs)))
    focus = ",".join(
        f"#{name}:focus-visible~header label[for={name}]"
        for name in [*(f"by-{axis}" for axis in AXES), *(f"show-{i}" for i in range(len(runs)))]
    )
    return (
        f":root{{--letters:{letters}}}{hidden}{{display:none}}{focus}{{outline:2px solid}}"
        f"{faint}{{opacity:.4;text-decoration:line-through}}"
    )


def legend(runs: list[Run]) -> Markup:
    axes = [tag("label", text, for_=f"by-{axis}") for axis, text in AXES.items()]
    names = [
        tag("label", tag("i"), run.name, for_=f"show-{i}", class_=color(i), title="show or hide")
        for i, run in enumerate(runs)
    ]
    return join(
        tag("div", *names, class_="legend"),
        tag("div", tag("span", "over"), *axes, class_="axes"),
    )


def notes(runs: list[Run]) -> Markup:
    """What was found wrong in the folders."""
    items = [tag("li", tables.name_of(run, i), f" {note}") for i, run in enumerate(runs) for note in run.notes]
    for i, run in enumerate(runs):
        for key, what in COUNTED.items():
            if number := (run.of("train").points(key)[1] or [0])[-1]:
                items.append(tag("li", tables.name_of(run, i), f" {number:,.0f} {what}"))
    return tag("ul", *items, class_="notes") if items else Markup()


def chart_sections(runs: list[Run], drawn: Charts) -> list[Markup]:
    """The sections of charts; metrics that none of them knows come last."""
    known, parts = set(BESIDE), []
    recorded = {kind: tables.recorded(runs, kind) for kind in tables.KINDS}
    for title, kind, expected, optional in SECTIONS:
        keys = [key for key in (*expected, *optional) if key in recorded[kind]]
        if title.startswith("Speed"):
            keys += [key for key in recorded[kind] if key.endswith("_seconds")]
        charts = [drawn.chart(kind, key) for key in keys]
        missing = [quantity(key).title for key in expected if key not in recorded[kind]]
        if title == "Calibration":
            diagrams = reliability.figures(runs)
            charts += diagrams
            missing += [] if diagrams else ["accuracy over confidence"]
        above = tables.speeds(runs) if title.startswith("Speed") else Markup()
        parts.append(section(title, above, charts, missing))
        known |= {(kind, key) for key in keys}
    rest = [(kind, key) for kind, keys in recorded.items() for key in keys if key not in (*AXIS_KEYS, *COUNTED)]
    charts = [drawn.chart(kind, key) for kind, key in rest if (kind, key) not in known]
    if charts:
        content = tag("details", tag("summary", f"{len(charts)} more"), tag("div", *charts, class_="charts"))
        parts.append(part("Everything else that was recorded", content))
    return parts


def section(title: str, above: Markup, charts: list[Markup], missing: list[str]) -> Markup:
    return tag(
        "section",
        tag("h2", title),
        tag("p", REMARKS[title], class_="remark") if title in REMARKS and charts else Markup(),
        above,
        tag("div", *charts, class_="charts") if charts else Markup(),
        tag("p", f"Not measured: {', '.join(missing)}.", class_="missing") if missing else Markup(),
    )


def data(runs: list[Run]) -> Markup:
    """The recorded values under the pointer as JSON: all lines of a run, or MOST_ROWS of them evenly spread."""
    found = []
    for i, run in enumerate(runs):
        kinds = {}
        for kind in tables.KINDS:
            lines = run.of(kind)
            rows = spread_rows(len(lines.steps))
            columns = {key: values for key, values in lines.columns.items() if key not in AXIS_KEYS} | lines.axes
            kinds[kind] = {key: [rounded(values[row]) for row in rows] for key, values in columns.items()}
        found.append({"name": run.name, "class": color(i), **kinds})
    return Markup(json.dumps(found, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def spread_rows(count: int) -> list[int]:
    if count <= MOST_ROWS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)]


def rounded(value: float | None) -> float | None:
    """Six significant digits; null for what is not finite, which JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
