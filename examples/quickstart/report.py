"""Compare the quickstart's runs: a table on the screen and in report.md, the curves in curves.png.

python report.py RUNS_FOLDER
"""

import contextlib
import json
import os
import pathlib
import platform
import sys

from megakd.config import Config

NAMES = {
    "teacher": "teacher",
    "student_kd": "student, distilled",
    "student_recorded": "student, from a recording",
    "student_ce": "student, data alone",
}
STUDENTS = tuple(NAMES)[1:]


def main(folder: str) -> int:
    out = pathlib.Path(folder)
    curves = {name: validation_curve(out / name) for name in NAMES}
    scores = {name: last_line(out / name / "evaluations.jsonl") for name in STUDENTS}
    scores["teacher"] = curves["teacher"][-1]
    recording = f"The recording took {(out / 'recording_seconds').read_text().strip()} s, once."
    verdicts = [verdict(curves, name) for name in STUDENTS[:-1]]
    report = "\n".join([*table(scores), "", *verdicts, recording, "", *completions(out)])
    (out / "report.md").write_text(report + "\n", encoding="utf-8")
    draw(curves, title(out), out / "curves.png")
    print(report)
    print(f"\ncurves: {out / 'curves.png'}")
    return 0


def last_line(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def validation_curve(run: pathlib.Path) -> list[dict]:
    """The run's validation lines, each with the seconds of training (validation left out) up to its step."""
    seconds, curve = 0.0, []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "train":
            seconds += entry["seconds"]
        elif entry["kind"] == "validation":
            curve.append(entry | {"training_seconds": seconds})
    return curve


def table(scores: dict[str, dict]) -> list[str]:
    rows = ["| model | held-out CE (nats) | KL to teacher (nats) | top-1 agreement | ECE |", "|---|---|---|---|---|"]
    for name, label in NAMES.items():
        score = scores[name]
        kl = f"{score['kd']:.3f}" if name != "teacher" else "0"
        agreement = f"{score['agreement']:.1%}" if name != "teacher" else "100%"
        rows.append(f"| {label} | {score['ce']:.3f} | {kl} | {agreement} | {score['ece']:.3f} |")
    return rows


def verdict(curves: dict[str, list[dict]], name: str) -> str:
    """When a student reaches the final held-out CE of the one that learns from the data alone."""
    goal = curves["student_ce"][-1]
    reached = next((entry for entry in curves[name] if entry["ce"] <= goal["ce"]), None)
    target = f"CE {goal['ce']:.3f}, which the data-only student has after {cost(goal)},"
    if reached is None:
        best = min(entry["ce"] for entry in curves[name])
        return f"The {NAMES[name]}, does not reach {target} its best is {best:.3f}."
    return f"The {NAMES[name]}, reaches {target} after {cost(reached)}."


def cost(entry: dict) -> str:
    return f"{entry['step']} steps and {entry['training_seconds']:.0f} s of training"


def completions(out: pathlib.Path) -> list[str]:
    lines = []
    for name, label in NAMES.items():
        lines += [f"{label}:", "```", (out / name / "completion.txt").read_text(encoding="utf-8").rstrip(), "```"]
    return lines


def title(out: pathlib.Path) -> str:
    """Which models, seed and machine the curves are of."""
    teacher, student = (Config.load(out / name / "config.yaml") for name in ("teacher", "student_kd"))
    sizes = [f"{c.student.model.num_layers} layers of {c.student.model.hidden_size}" for c in (teacher, student)]
    return f"teacher {sizes[0]}, student {sizes[1]}; seed {student.run.seed}; {machine()}"


def machine() -> str:
    """The processor's name, as far as the system tells it, and how many of it there are."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{os.cpu_count()} x {name}"


def draw(curves: dict[str, list[dict]], title: str, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, key, label in zip(axes, ("step", "training_seconds"), ("optimizer steps", "seconds"), strict=True):
        for name in STUDENTS:
            curve = curves[name]
            axis.plot([e[key] for e in curve], [e["ce"] for e in curve], marker=".", label=NAMES[name])
        axis.axhline(curves["teacher"][-1]["ce"], color="grey", linestyle=":", label="teacher")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out cross-entropy (nats)")
    axes[1].legend()
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
