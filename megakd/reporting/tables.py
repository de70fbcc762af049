"""Tables of a report: what the runs are, final and best values, speed and phases, settings that differ."""

import math
import statistics

from megakd.reporting.curves import color
from megakd.reporting.lines import number_of
from megakd.reporting.markup import Markup, join, table, tag
from megakd.reporting.quantities import duration, number, phase, quantity, shown, words
from megakd.reporting.runs import Run
from megakd.reporting.settings import care, differing, setting_texts, value_at

SHADES, REST = (44, 26, 36, 54, 20, 62), 14  # per cent of the run's colour: phases, and what is none
NARROW = 0.07  # of the longest bar: no room for letters
KINDS = {"validation": "held out", "train": "training"}


def name_of(run: Run, number: int) -> Markup:
    return tag("span", tag("i"), run.name, class_=f"name {color(number)}")


def heading(runs: list[Run]) -> list[str]:
    return ["", *(name_of(run, i) for i, run in enumerate(runs))]


def facts(runs: list[Run]) -> Markup:
    """One column for each run: where it is, how far it is, how long it took, and other lines of its metrics."""
    rows: dict[str, list[str]] = {
        "folder": [],
        "state": [],
        "steps": [],
        "supervised tokens": [],
        "time of training": [],
    }
    for run in runs:
        last = {axis: places[-1] for axis, places in run.of("train").axes.items()}
        steps = max((lines.steps[-1] for lines in run.lines.values()), default=0)
        rows["folder"].append(str(run.folder))
        rows["state"].append(state(run))
        rows["steps"].append(f"{steps:,}{planned(run)}")
        rows["supervised tokens"].append(number(last["tokens"]) if "tokens" in last else "not measured")
        rows["time of training"].append(duration(last["seconds"]) if "seconds" in last else "not measured")
    others = dict.fromkeys(
        (kind, key) for run in runs for kind, lines in run.lines.items() if kind not in KINDS for key in lines.columns
    )
    for kind, key in others:
        values = [run.of(kind).columns.get(key, [None])[-1] for run in runs]
        rows[f"{words(kind)}: {quantity(key).title}"] = [shown(key, value) for value in values]
    return table(heading(runs), [[name, *cells] for name, cells in rows.items()], class_="facts")


def planned(run: Run) -> str:
    """` of N` where the config says how many steps the run has."""
    steps = run.config.get("train.steps", "null")
    return f" of {int(steps):,}" if steps.isdecimal() else ""


def state(run: Run) -> str:
    if run.stopped is None:
        return "running, or ended without a last word"
    step, finished = run.stopped
    return "finished" if finished else f"stopped at step {step:,}"


def finals(runs: list[Run]) -> Markup:
    """Final and best values of every metric that has a good end, and what `megakd evaluate` said last."""
    rows = []
    for kind, title in KINDS.items():
        for key in (key for key in recorded(runs, kind) if quantity(key).better):
            pairs = [final_and_best(run, kind, key) for run in runs]
            won = winners([pair and pair[0] for pair in pairs], key) if kind == "validation" else set()
            won = set() if care(runs, kind, key) else won
            cells = [value_cell(key, pair, i in won) for i, pair in enumerate(pairs)]
            rows.append([join(quantity(key).title, tag("small", f" {title}")), *cells])
    keys = dict.fromkeys(key for run in runs for line in run.evaluations[-1:] for key in line)
    for key in (key for key in keys if quantity(key).better):
        values = [number_of(run.evaluations[-1].get(key)) if run.evaluations else None for run in runs]
        if any(value is not None for value in values):
            cells = [value_cell(key, None if value is None else (value, None, None)) for value in values]
            rows.append([join(quantity(key).title, tag("small", " megakd evaluate")), *cells])
    return table(heading(runs), rows, class_="values") if rows else tag("p", "Nothing is measured yet.")


def recorded(runs: list[Run], kind: str) -> list[str]:
    """Every metric of a kind that some run has, in the order of the run that has most."""
    return in_order([list(run.of(kind).columns) for run in runs])


def in_order(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in sorted(lists, key=len, reverse=True) for name in names))


def final_and_best(run: Run, kind: str, key: str) -> tuple[float, float | None, int | None] | None:
    """(last value, best value, its step); None where the metric has no finite value."""
    steps, values = run.of(kind).points(key)
    if not values:
        return None
    best = min(values) if quantity(key).better == "lower" else max(values)
    return values[-1], best, steps[values.index(best)]


def value_cell(key: str, values: tuple[float, float | None, int | None] | None, won: bool = False) -> Markup:
    if values is None:
        return tag("span", "not measured", class_="absent")
    final, best, step = values
    text = tag("b" if won else "span", shown(key, final))
    return text if best is None else join(text, tag("small", f" best {shown(key, best)} at step {step:,}"))


def winners(values: list[float | None], key: str) -> set[int]:
    """The runs with the best final value; none where one run alone has it, or all the same."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return set()
    best = min(known) if quantity(key).better == "lower" else max(known)
    won = {i for i, value in enumerate(values) if value == best}
    return won if len(won) < len(known) else set()


def phase_means(run: Run) -> dict[str, float]:
    """Mean seconds of a step's phases, and of the step as `seconds`; the first logged step, which also starts threads
    and opens files, is left out where there is another."""
    lines = run.of("train")
    timed = [(key, lines.points(key)[1]) for key in lines.columns if key == "seconds" or key.endswith("_seconds")]
    return {key: statistics.fmean(values[1:] or values) for key, values in timed if values}


def speeds(runs: list[Run]) -> Markup:
    """Bars of the phases of a step, and the figures."""
    means = [phase_means(run) for run in runs]
    longest = max((whole(m) for m in means), default=0.0)
    keys = in_order([list(m) for m in means])
    bars = [bar(run, i, m, keys, longest) for i, (run, m) in enumerate(zip(runs, means, strict=True)) if m]
    rows = []
    for key in keys:
        cells = [share(key, m) for m in means]
        rows.append([quantity(key).title, *cells])
    for key in recorded(runs, "train"):
        values = [run.of("train").points(key)[1] for run in runs]
        if key.endswith(("_per_second", "_per_rank")):
            rows.append([f"{quantity(key).title}, median", *(shown(key, median(v)) for v in values)])
        elif key.endswith("_bytes"):
            rows.append([f"{quantity(key).title}, highest", *(shown(key, max(v, default=None)) for v in values)])
    validation = [final_and_best(run, "validation", "seconds") for run in runs]
    if any(validation):
        rows.append(["seconds of a validation, last", *(shown("seconds", v[0] if v else None) for v in validation)])
    if not rows:
        return tag("p", "Not measured: seconds, tokens a second.", class_="missing")
    return join(tag("div", *bars, class_="bars"), table(heading(runs), rows, class_="values"))


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def whole(means: dict[str, float]) -> float:
    """Seconds of a step: the measured total, or the phases where they sum to more."""
    return max(means.get("seconds", 0.0), math.fsum(m for key, m in means.items() if key != "seconds"))


def share(key: str, means: dict[str, float]) -> str:
    if key not in means:
        return shown(key, None)
    total = whole(means)
    return shown(key, means[key]) + (f" ({means[key] / total:.0%})" if key != "seconds" and total else "")


def bar(run: Run, number: int, means: dict[str, float], keys: list[str], longest: float) -> Markup:
    """One run's mean step, cut into its phases; what no phase covers is the rest.

    Args:
        keys: of all runs, so that a phase has one shade in all bars.
        longest: seconds of the longest bar.
    """
    shades = {phase(key): SHADES[i % len(SHADES)] for i, key in enumerate(key for key in keys if key != "seconds")}
    total, parts = whole(means), {phase(key): means[key] for key in keys if key in means and key != "seconds"}
    rest = total - math.fsum(parts.values())
    if rest > 0.005 * total:
        parts["the rest" if parts else "step"] = rest
    pieces = []
    for name, seconds in parts.items():
        text, width = f"{name} {shown('seconds', seconds)}", seconds / longest
        look = f"width:{width:.2%};--mix:{shades.get(name, REST)}%"
        inside = tag("em", text) if width > NARROW else ""
        pieces.append(tag("span", inside, style=look, title=f"{text}, {seconds / total:.0%}"))
    return tag("div", name_of(run, number), tag("div", *pieces, class_=f"bar {color(number)}"))


def settings(runs: list[Run]) -> Markup:
    """The keys that differ, and below, folded, those that do not."""
    configured = [(i, run) for i, run in enumerate(runs) if run.config]
    if not configured:
        return tag("p", "Not known: no run has a config that can be read.", class_="missing")
    flats = [setting_texts(run) for _, run in configured]
    head = ["", *(name_of(run, i) for i, run in configured)]
    different = differing(runs)
    parts = []
    if different:
        rows = [[tag("code", key), *(tag("code", value_at(flat, key)) for flat in flats)] for key in different]
        parts.append(table(head, rows, class_="settings"))
    elif len(configured) > 1:
        parts.append(tag("p", "None: these runs have the same settings."))
    same = [key for key in flats[0] if not any(key == d or d.startswith(f"{key}.") for d in different)]
    rows = [[tag("code", key), tag("code", flats[0][key])] for key in same]
    title = f"{len(same)} settings that do not differ" if len(configured) > 1 else f"its {len(same)} settings"
    parts.append(tag("details", tag("summary", title), table(["", ""], rows, class_="settings")))
    return join(*parts)
