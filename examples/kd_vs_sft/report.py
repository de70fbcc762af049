"""Five ways to train one student, over all seeds that are finished: python report.py RUNS_FOLDER

Tables on the screen and in report.md, curves in curves.png. Figures are means over seeds; ± is half the range.
Seconds are steps times the median step of the least disturbed seed, preparations those of the quickest: other work on
the machine does not count.
"""

import json
import pathlib
import statistics
import sys

WAYS = {  # the runs whose steps follow each other, and the preparation that they need
    "data alone": (("data",), None),
    "online": (("online",), None),
    "recorded": (("recorded",), "recorded"),
    "teacher's texts, then data": (("from_teacher", "then_data"), "sequence_level"),
}
MORE = {
    "online, 100 more on-policy": ("online", "more/on_policy"),
    "online, 100 more on data": ("online", "more/off_policy"),
}
SHARES = (25, 50, 75, 100)
FIGURES = {"ce": "held-out CE", "forward_kl": "KL(teacher, student)", "agreement": "top-1", "ece": "ECE"}


def main(folder: str) -> int:
    folders = [path.parent for path in sorted(pathlib.Path(folder).glob("seed*/finished"))]
    if not folders:
        print(f"no seed in {folder} is finished", file=sys.stderr)
        return 1
    runs = {run for way, _ in WAYS.values() for run in way} | {run for way in MORE.values() for run in way}
    a_step = {run: min(median_step(seed / run) for seed in folders) for run in runs}
    prepared = {}
    for line in (line for seed in folders for line in read(seed / "prepared.jsonl")):
        prepared[line["name"]] = min(line["seconds"], prepared.get(line["name"], line["seconds"]))
    seeds = [Seed(seed, a_step, prepared) for seed in folders]
    texts = [f"{len(seeds)} seeds: {', '.join(seed.folder.name for seed in seeds)}."]
    texts += ["", "At shares of the steps:", "", *by_steps(seeds)]
    texts += ["", "At shares of the seconds that the data alone takes (training; preparation not counted):", ""]
    texts += [*by_seconds(seeds), "", "To the final CE of the data alone:", "", *crossings(seeds)]
    report = "\n".join(texts)
    pathlib.Path(folder, "report.md").write_text(report + "\n", encoding="utf-8")
    draw(seeds, pathlib.Path(folder, "curves.png"))
    print(report)
    return 0


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def median_step(run: pathlib.Path) -> float:
    """Seconds."""
    return statistics.median(line["seconds"] for line in read(run / "metrics.jsonl") if line["kind"] == "train")


class Seed:
    """What one seed's runs have measured.

    Args:
        a_step: seconds of a step of every run.
        prepared: seconds of preparations, by name.

    Attributes:
        figures: of a run's checkpoint, by (run, step).
    """

    def __init__(self, folder: pathlib.Path, a_step: dict[str, float], prepared: dict[str, float]):
        self.folder, self.a_step, self.prepared, self.figures = folder, a_step, prepared, {}
        for line in read(folder / "figures.jsonl"):
            checkpoint = pathlib.Path(line["student"])
            run = checkpoint.parent.parent.relative_to(folder)
            self.figures[str(run), int(checkpoint.name.removeprefix("step_"))] = line

    def lines(self, runs: tuple[str, ...], kind: str) -> list[dict]:
        """Of metrics.jsonl of runs that follow each other; `at_step` and `at_seconds` (of training) go on."""
        before, seconds, found = 0, 0.0, []
        for run in runs:
            lines = read(self.folder / run / "metrics.jsonl")
            for line in lines:
                if line["kind"] == kind:
                    at = {"at_step": before + line["step"], "at_seconds": seconds + line["step"] * self.a_step[run]}
                    found.append(line | at)
            before += lines[-1]["step"]
            seconds += lines[-1]["step"] * self.a_step[run]
        return found

    def checkpoints(self, runs: tuple[str, ...]) -> list[dict]:
        """The exact figures of what was kept, in order."""
        seconds = {line["at_step"]: line["at_seconds"] for line in self.lines(runs, "train")}
        before, found = 0, []
        for run in runs:
            steps = sorted(step for name, step in self.figures if name == run)
            for step in steps:
                at = before + step
                found.append(self.figures[run, step] | {"at_step": at, "at_seconds": seconds[at]})
            before += steps[-1]
        return found


def mean(values: list[float], form: str) -> str:
    middle, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{middle:{form}}" + (f" ±{half:{form}}" if len(values) > 1 and (half >= 0.5 or form != ".0f") else "")


def cells(points: list[dict]) -> str:
    forms = {"agreement": ".1%"}
    return " | ".join(mean([point[name] for point in points], forms.get(name, ".3f")) for name in FIGURES)


def by_steps(seeds: list[Seed]) -> list[str]:
    rows = ["| | steps | " + " | ".join(FIGURES.values()) + " |", "|---|" + "---|" * (1 + len(FIGURES))]
    steps = max(point["at_step"] for point in seeds[0].checkpoints(WAYS["data alone"][0]))
    for share in SHARES:
        for way, (runs, _) in WAYS.items():
            at = steps * share // 100
            points = [next(p for p in seed.checkpoints(runs) if p["at_step"] == at) for seed in seeds]
            rows.append(f"| {way} | {at} | {cells(points)} |")
    for way, runs in MORE.items():
        points = [seed.checkpoints(runs)[-1] for seed in seeds]
        rows.append(f"| {way} | {points[0]['at_step']} | {cells(points)} |")
    return rows


def by_seconds(seeds: list[Seed]) -> list[str]:
    rows = ["| | seconds | steps by then | " + " | ".join(FIGURES.values()) + " | preparation, s |"]
    rows.append("|---|" + "---|" * (3 + len(FIGURES)))
    for share in SHARES:
        for way, (runs, preparation) in WAYS.items():
            points, limits = [], []
            for seed in seeds:
                limits.append(seed.lines(("data",), "train")[-1]["at_seconds"] * share / 100)
                points.append([p for p in seed.checkpoints(runs) if p["at_seconds"] <= limits[-1]][-1:])
            limit, prepared = mean(limits, ".0f"), mean([seed.prepared.get(preparation, 0) for seed in seeds], ".0f")
            if all(points):
                points = [point for (point,) in points]
                steps = mean([point["at_step"] for point in points], ".0f")
                rows.append(f"| {way} | {limit} | {steps} | {cells(points)} | {prepared} |")
            else:
                rows.append(f"| {way} | {limit} | under 25 |" + " |" * len(FIGURES) + f" {prepared} |")
    return rows


def crossings(seeds: list[Seed]) -> list[str]:
    rows = ["| | steps | seconds of training | with preparation |", "|---|---|---|---|"]
    for way, (runs, preparation) in WAYS.items():
        steps, seconds, all_seconds = [], [], []
        for seed in seeds:
            goal = seed.lines(("data",), "validation")[-1]["ce"]
            reached = next((line for line in seed.lines(runs, "validation") if line["ce"] <= goal), None)
            if reached is not None:
                steps.append(reached["at_step"])
                seconds.append(reached["at_seconds"])
                all_seconds.append(reached["at_seconds"] + seed.prepared.get(preparation, 0))
        if len(steps) == len(seeds):
            rows.append(f"| {way} | {mean(steps, '.0f')} | {mean(seconds, '.0f')} | {mean(all_seconds, '.0f')} |")
        else:
            rows.append(f"| {way} | not reached by {len(seeds) - len(steps)} of {len(seeds)} | | |")
    return rows


def draw(seeds: list[Seed], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, key, label in zip(
        axes, ("at_step", "at_seconds"), ("optimizer steps", "seconds of training"), strict=True
    ):
        for number, (way, (runs, _)) in enumerate(WAYS.items()):
            for seed in seeds:
                lines = seed.lines(runs, "validation")
                name = way if seed is seeds[0] else None
                xs, ys = ([line[k] for line in lines] for k in (key, "ce"))
                axis.plot(xs, ys, color=f"C{number}", linewidth=1, alpha=0.8, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out cross-entropy (nats)")
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{len(seeds)} seeds; seconds are steps times an undisturbed step", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
