"""One line for each way of settings.txt, over all seeds: python report.py RUNS_FOLDER; also in report.md

Figures are means over seeds; ± is half the range. Seconds are the median step of the seed that was disturbed least.
Bytes are those of a token's targets, as a step keeps them between the teacher's phase and the student's.
"""

import json
import pathlib
import statistics
import sys

from megakd.config import Config

FIGURES = {"ce": ".3f", "forward_kl": ".3f", "agreement": ".1%", "ece": ".3f"}


def main(folder: str) -> int:
    rows = [
        "| targets | held-out CE | KL(teacher, student) | top-1 | ECE | s a step | bytes a token |",
        "|---" * 7 + "|",
    ]
    lines = pathlib.Path(__file__).with_name("settings.txt").read_text(encoding="utf-8").splitlines()
    for name in (line.split()[0] for line in lines if not line.startswith("#")):
        runs = sorted(path.parent for path in pathlib.Path(folder).glob(f"seed*/{name}/figures.jsonl"))
        if runs:
            found = [read(run / "figures.jsonl")[-1] for run in runs]
            cells = [mean([figures[key] for figures in found], form) for key, form in FIGURES.items()]
            seconds = min(median_step(run) for run in runs)
            rows.append(f"| {name} ({len(runs)}) | {' | '.join(cells)} | {seconds:.2f} | {target_bytes(runs[0])} |")
    text = "\n".join(rows)
    pathlib.Path(folder, "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean(values: list[float], form: str) -> str:
    middle, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{middle:{form}}" + (f" ±{half:{form}}" if len(values) > 1 else "")


def median_step(run: pathlib.Path) -> float:
    return statistics.median(line["seconds"] for line in read(run / "metrics.jsonl") if line["kind"] == "train")


def target_bytes(run: pathlib.Path) -> str:
    """An int64 id and a float32 log-probability an entry, and the tail; the teacher's hidden states in float32."""
    config = Config.load(run / "config.yaml")
    if config.teacher is None:
        return "0"
    if config.loss.targets == "whole":
        teacher = Config.load(pathlib.Path(config.teacher.checkpoint, "config.yaml"))
        return f"{4 * teacher.student.model.hidden_size:,}"
    entries = config.loss.draws if config.loss.targets == "sampled" else config.loss.top_k
    return f"{12 * entries + 4:,}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
