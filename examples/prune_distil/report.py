"""The arms of examples/prune_distil as a table (report.md) and a picture (curves.png): python report.py RUNS_FOLDER"""

import json
import pathlib
import statistics
import sys

ARMS = {
    "pruned_kd": "pruned, distilled",
    "random_kd": "random weights, distilled",
    "pruned_ce": "pruned, data alone",
}
FIGURES = {"ce": "held-out CE (nats)", "forward_kl": "KL to the teacher (nats)"}
SHARES = (0.01, 0.05, 0.25, 1.0)  # of the steps


def main(folder: str) -> int:
    out = pathlib.Path(folder)
    seeds = sorted(out.glob("seed_*"))
    before = [lines(seed / "before.jsonl") for seed in seeds]
    curves = {arm: [validations(seed / arm) for seed in seeds] for arm in ARMS}
    report = "\n".join([*table(before, curves), "", verdict(before, curves)])
    (out / "report.md").write_text(report + "\n", encoding="utf-8")
    draw(before, curves, len(seeds), out / "curves.png")
    print(report)
    return 0


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def validations(run: pathlib.Path) -> dict[int, dict]:
    """A run's validations by step."""
    return {line["step"]: line for line in lines(run / "metrics.jsonl") if line["kind"] == "validation"}


def table(before: list[list[dict]], curves: dict) -> list[str]:
    steps = points(curves)
    heads = [f"step {step} ({share:.0%})" for step, share in zip(steps, SHARES, strict=True)]
    rows = [f"| | before | {' | '.join(heads)} |", "|---|" + "---|" * (1 + len(steps))]
    for figure, name in FIGURES.items():
        key = "kd" if figure == "forward_kl" else figure  # training measures the whole distribution
        rows.append(f"| **{name}** |" + " |" * (1 + len(steps)))
        rows.append(f"| teacher | {spread([b[0][figure] for b in before])} |" + " |" * len(steps))
        for arm, words in ARMS.items():
            first = "" if arm == "random_kd" else spread([b[1][figure] for b in before])
            cells = [spread([curve[step][key] for curve in curves[arm]]) for step in steps]
            rows.append(f"| {words} | {first} | {' | '.join(cells)} |")
    return rows


def points(curves: dict) -> list[int]:
    last = max(curves["pruned_kd"][0])
    return [max(round(share * last), 1) for share in SHARES]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def verdict(before: list[list[dict]], curves: dict) -> str:
    """Which part of what pruning has cost in CE is won back, and when."""
    parts = []
    for step, share in zip(points(curves), SHARES, strict=True):
        won = [
            (start["ce"] - curve[step]["ce"]) / (start["ce"] - teacher["ce"])
            for (teacher, start), curve in zip(before, curves["pruned_kd"], strict=True)
        ]
        parts.append(f"{statistics.fmean(won):.0%} after {share:.0%} of the steps")
    return f"Of the CE that pruning has cost, distillation wins back {', '.join(parts)}."


def draw(before: list[list[dict]], curves: dict, seeds: int, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, (key, name) in zip(axes, FIGURES.items(), strict=True):
        in_metrics = "kd" if key == "forward_kl" else key
        for color, (arm, words) in zip(("C0", "C1", "C2"), ARMS.items(), strict=True):
            for number, (start, curve) in enumerate(zip(before, curves[arm], strict=True)):
                known = {} if arm == "random_kd" else {0: start[1][key]}
                known |= {step: line[in_metrics] for step, line in sorted(curve.items())}
                label = words if number == 0 else None
                axis.plot(list(known), list(known.values()), marker=".", color=color, label=label, linewidth=1)
        if key == "ce":
            axis.axhline(before[0][0]["ce"], color="grey", linestyle=":", label="teacher")
            axis.legend(fontsize="small")
        axis.set(xlabel="optimizer steps", ylabel=name)
        axis.grid(alpha=0.3)
    figure.suptitle(f"4 layers, 512 feed-forward channels, cut to 3 and 344; {seeds} seeds", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
