"""Run folders as a run leaves them, with numbers that are easy to look up."""

import json
import pathlib

from megakd.config import Config

MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "max_sequence_length": 32}


def config(run_dir: pathlib.Path, **changes) -> Config:
    """A resolved config; `changes` are dotted keys with __ for the dot."""
    values = {
        "run": {"dir": str(run_dir)},
        "student": {"model": MODEL},
        "teacher": {"checkpoint": "runs/teacher"},
        "loss": {"top_k": 7, "ce_weight": 0.25},
        "data": {"train": "data/train", "validation": "data/val", "tokenizer": "t.model", "sequence_length": 32},
        "train": {"steps": 23, "global_batch_size": 8},
        "optimizer": {"lr": 3e-4},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return Config.from_dict({section: value for section, value in values.items() if value is not None})


def train_line(step: int, every: int = 1, **changes) -> dict:
    """A line of step `step` of a run that logs one step in `every`; a step takes 2 s and has 97 tokens."""
    line = {
        "kind": "train", "step": step, "loss": 5.0 / step + 0.25, "kd": 4.0 / step, "ce": 3.0 + 1.0 / step,
        "teacher_ce": 2.75, "agreement": 1 - 0.875 / step, "grad_norm": 1.5 / step, "lr": 3e-4 / step,
        "seconds": 2.0, "data_seconds": 0.25, "teacher_seconds": 0.5, "student_seconds": 1.125,
        "tokens_per_second": 48.5, "peak_memory_bytes": 2_500_000_000, "tokens": 97 * step, "skipped": 0,
    }  # fmt: skip
    return line | changes


def validation_line(step: int, **changes) -> dict:
    line = {
        "kind": "validation", "step": step, "loss": 6.0 / step, "kd": 4.5 / step, "ce": 3.125 + 1.0 / step,
        "teacher_ce": 2.875, "agreement": 0.5, "accuracy": 0.375, "ece": 0.0625 / step, "perplexity": 25.0,
        "tokens": 311, "seconds": 1.0,
    }  # fmt: skip
    return line | changes


def calibrated(line: dict, sharp: float = 1.0) -> dict:
    """The line with bins: of 5, the first is empty; `sharp` above 1 is a model that is too sure."""
    tokens = [0, 40, 30, 20, 10]
    sure = [0.0, *(n * (0.1 + 0.2 * i) for i, n in enumerate(tokens[1:], start=1))]
    right = [round(value / sharp) for value in sure]
    return line | {"calibration": {"tokens": tokens, "confidence": sure, "right": right}}


def lines_of(steps: int = 23, every: int = 1, validate: int = 5) -> list[dict]:
    """Every line of a run's metrics, in the order of a run."""
    lines = [{"kind": "data", "step": 0, "samples": 1234}]
    for step in range(1, steps + 1):
        lines += [train_line(step)] if step % every == 0 else []
        lines += [validation_line(step)] if step % validate == 0 else []
    return lines


def write(folder: pathlib.Path, lines: list[dict], *, torn: str = "", **changes) -> pathlib.Path:
    """A run folder; `torn` is what a kill left of a last line. `changes` are of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + torn, encoding="utf-8")
    config(folder, **changes).save(folder / "config.yaml")
    (folder / "versions.txt").write_text("megakd 0.1.0\ntorch 2.13.0\n", encoding="utf-8")
    return folder
