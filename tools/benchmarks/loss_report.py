"""The benchmark's table and JSON: measurements, what they are compared with, and the recipe they travel with."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from loss_forms import BASELINES, HEADLINES

from megakd.publish import publish_text

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "torch megatron-core triton nvidia-modelopt liger-kernel".split()
GRADIENT_BYTES = {"bf16": 6, "fp16": 6, "fp32": 12}  # per logit: read, read, written


def build_report(options: argparse.Namespace, rows: list[dict], floors: list[dict], load_before) -> dict:
    """Adds to the rows how far the student's part is from the floor, and compares headline forms with all others."""
    bandwidths = {floor["ranks"]: floor["copy_bytes_per_second"] for floor in floors}
    for row in rows:
        if "not_run" not in row and row["kind"] == "logits":
            logits = row["tokens"] * row["vocab"] / row["ranks"]
            row["floor_seconds"] = GRADIENT_BYTES[options.dtype] * logits / bandwidths[row["ranks"]]
            row["student_over_floor"] = (row["forward_seconds"] + row["backward_seconds"]) / row["floor_seconds"]
    return {
        "command": " ".join(["python", "tools/benchmarks/loss.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": _git(
            "status", "--porcelain", "--untracked-files=no", "--", "megakd/kernels", "tools/benchmarks"
        ),
        "hardware": _hardware(options.device),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "floors": floors,
        "rows": rows,
        "ratios": compare(rows),
    }


def compare(rows: list[dict]) -> list[dict]:
    """Each headline form beside every other family's form and, for those with an output layer, the materialised one.

    A ratio is the median over the repeats of one round's ratio; above 1 means that ours takes less. That of the seconds
    says what one waits for, that of the CPU seconds (of the busiest rank) hardly depends on who else uses the machine.
    """
    ratios = []
    measured = [row for row in rows if "not_run" not in row]
    for ours in measured:
        if ours["form"] not in HEADLINES:
            continue
        for other in measured:
            same = all(ours[name] == other[name] for name in ("ranks", "vocab", "kind"))
            same = same and (None in (ours["top_k"], other["top_k"]) or ours["top_k"] == other["top_k"])
            if same and (other["family"] != "megakd" or other["form"] == BASELINES.get(ours["form"])):
                each, each_cpu = (
                    [theirs / our for theirs, our in zip(other[name], ours[name], strict=True)]
                    for name in ("seconds_of_repeats", "cpu_seconds_of_repeats")
                )
                ratios.append(
                    {name: ours[name] for name in ("form", "ranks", "vocab")}
                    | {
                        "top_k": ours["top_k"] or other["top_k"],
                        "against": other["form"],
                        "against_right": other["right"],
                    }
                    | {"times_faster": statistics.median(each), "lowest": min(each), "highest": max(each)}
                    | {"times_less_cpu": statistics.median(each_cpu)}
                    | {"lowest_cpu": min(each_cpu), "highest_cpu": max(each_cpu)}
                    | {"extra_shards": ours["extra_shards"], "their_extra_shards": other["extra_shards"]}
                )
    return ratios


def print_report(report: dict) -> None:
    hardware, options = report["hardware"], report["options"]
    print(
        f"{hardware['device']}, {hardware['cores']} cores, load {report['load_average']['before'][0]:.1f} before and "
        f"{report['load_average']['after'][0]:.1f} after; T={options['tokens']}, {options['dtype']}, median of "
        f"{options['repeats']}; commit {report['commit'][:10]}"
    )
    for floor in report["floors"]:
        print(
            f"TP {floor['ranks']}: {floor['copy_bytes_per_second'] / 1e9:.2f} GB/s copied per rank with "
            f"{floor['threads']} thread(s) each"
        )
    heads = "form K V TP seconds cpu teacher forward backward x_floor extra/shard".split()
    heads += "sent:teacher forward backward error".split()
    lines = [heads] + [_cells(row) for row in report["rows"] if "not_run" not in row]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())
    print(
        "seconds of the slowest rank, cpu seconds of the busiest; x_floor: forward + backward over 6 B per bf16 logit "
        "at the copy bandwidth;\nextra: peak bytes beyond what is given (and a gradient of the output layer), as a "
        "multiple of this rank's "
        "logits;\nsent: bytes handed to collectives, per token and rank; error: of the gradient, relative to float64"
    )
    for form, reason in sorted({(row["form"], row["not_run"]) for row in report["rows"] if "not_run" in row}):
        print(f"not run: {form}: {reason}")
    print()
    for ratio in report["ratios"]:
        at = f"TP {ratio['ranks']}, V={ratio['vocab']}" + (f", K={ratio['top_k']}" if ratio["top_k"] else "")
        print(
            f"{at}: {ratio['form']} is {ratio['times_faster']:.2f} times ({ratio['lowest']:.2f} to "
            f"{ratio['highest']:.2f}) as fast as {ratio['against']} (by CPU seconds {ratio['times_less_cpu']:.2f}, "
            f"{ratio['lowest_cpu']:.2f} to {ratio['highest_cpu']:.2f}), with {ratio['extra_shards']:.2f} against "
            f"{ratio['their_extra_shards']:.2f} shards extra"
            + ("" if ratio["against_right"] else "; the other is WRONG")
        )


def _cells(row: dict) -> list[str]:
    def seconds(name):
        return "-" if row[name] is None else f"{row[name]:.4f}"

    error = f"{row['gradient_error']:.1e}"
    if not row["right"]:
        error = f"WRONG: {error}, gradient x {row['gradient_factor']:.4f}"
    sent = [f"{row[f'sent_{part}_bytes']:.0f}" for part in ("teacher", "forward", "backward")]
    return [
        row["form"],
        str(row["top_k"] or "-"),
        str(row["vocab"]),
        str(row["ranks"]),
        *map(seconds, ("seconds", "cpu_seconds", "teacher_seconds", "forward_seconds", "backward_seconds")),
        f"{row['student_over_floor']:.2f}" if "student_over_floor" in row else "-",
        f"{row['extra_shards']:.3f}",
        *sent,
        error,
    ]


def save_report(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, json.dumps(report, indent=1) + "\n")


def _hardware(device: str) -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    return {
        "device": gpu or cpu,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
