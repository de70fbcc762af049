"""Where the students are close to their teacher: python report.py RUNS_FOLDER...

With several folders, one for each seed, figures are means and ± is half their range.
"""

import json
import pathlib
import statistics
import sys

RUNS = {"before": "before", "off_policy": "100 steps on data", "on_policy": "100 steps on its own completions"}
PHASES = ("rollouts_seconds", "teacher_seconds", "student_seconds", "seconds")


def main(*folders: str) -> int:
    outs = [pathlib.Path(folder) for folder in folders]
    print("| student | KL(student, teacher) where it goes itself | its tokens' CE under the teacher |", end="")
    print(" KL(student, teacher) on held-out texts | KL(teacher, student) there | CE there |")
    print("|---|---|---|---|---|---|")
    for run, name in RUNS.items():
        rows = []
        for out in outs:
            own, texts = read(out / f"{run}.figures.jsonl")
            rows.append((own["reverse_kl"], own["teacher_ce"], texts["reverse_kl"], texts["forward_kl"], texts["ce"]))
        print(f"| {name} | " + " | ".join(map(mean, zip(*rows, strict=True))) + " |")
    for run in ("on_policy", "off_policy"):
        lines = [line for out in outs for line in read(out / run / "metrics.jsonl") if line["kind"] == "train"]
        phases = ", ".join(
            f"{phase.removesuffix('_seconds')} {statistics.median(line.get(phase, 0.0) for line in lines):.2f}"
            for phase in PHASES
        )
        print(f"\n{RUNS[run]}: {lines[-1]['tokens']:,.0f} supervised tokens; median seconds of a step: {phases}")
    return 0


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean(values: tuple[float, ...]) -> str:
    half = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{half}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
