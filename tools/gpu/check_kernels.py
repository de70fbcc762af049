"""Times and checks the kernels and whole training steps on this machine's GPU: one command, one JSON file, ten minutes.

    python tools/gpu/check_kernels.py --output gpu.json                     # everything
    python tools/gpu/check_kernels.py --output gpu.json --parts losses head # some of it
    TRITON_INTERPRET=1 python tools/gpu/check_kernels.py --output dry.json --device cpu --tiny   # a dry run

Parts, in this order; each in a process of its own, so that one that fails, hangs or breaks its CUDA context leaves the
others alone. What a part has found so far is in the file after every row.

    passes     the passes over rows, in Triton and in plain PyTorch (loss_timings.py)
    losses     selection, sampling, prediction, every divergence sparse and dense, torch.topk beside them
    head       output layer and loss in one, and apart (head_timings.py)
    merge      what a rank of 2 and of 8 computes, and whether ranks agree with one rank (faked_shards.py)
    steps      whole training steps: KD with a live teacher, KD from its recording, CE (step_timings.py)
    te         is Transformer Engine there, and does it run?
    checks     every kernel against float64: odd widths, 2^18 columns, more than 2^31 elements (kernel_checks.py)

A time is the median of single runs on an idle device between device events, after warming up; its floor is the bytes
that must move over the bandwidth of a large copy. No time is asserted. Exit status 1: a part did not get to its end, or
something is WRONG; which, is in the last lines and in the file.
"""

import argparse
import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

PARTS = {
    "passes": ("loss_timings", "time_passes"),
    "losses": ("loss_timings", "time_losses"),
    "head": ("head_timings", "time_head"),
    "merge": ("faked_shards", "time_merges"),
    "steps": ("step_timings", "time_steps"),
    "te": ("step_timings", "import_transformer_engine"),
    "checks": ("kernel_checks", "run_checks"),
}
TINY = {"tokens": 2, "vocab": 40, "top_k": [2], "temperature": [2.0], "repeats": 1, "hidden": 8, "ranks": [2]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the JSON file; written after every row")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default all)")
    parser.add_argument("--seconds", type=float, default=570, help="for everything (default 570)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run, interpreted")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes of everything, one run of each")
    parser.add_argument("--tokens", type=int, default=8192, help="T of the timings (default 8192)")
    parser.add_argument("--vocab", type=int, default=131072, help="V of the timings (default 131072)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 1024], help="K of the timings (default 64 1024)")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the logits (default bf16)"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 2.0], help="(default 1 2)")
    parser.add_argument("--hidden", type=int, default=4096, help="H of the head (default 4096)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="that one device plays (default 2 8)")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (default 20)")
    parser.add_argument("--commit", help="what to record, where there is no git (default: git rev-parse HEAD)")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)  # run this part here; --output takes rows
    options = parser.parse_args(argv)
    if options.tiny:
        vars(options).update(TINY)
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    if max(options.top_k) > options.vocab or any(options.vocab % ranks for ranks in options.ranks):
        parser.error(f"--vocab {options.vocab} must be at least --top-k and a multiple of every one of --ranks")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.inside:
        run_inside(options)
        return 0
    deadline = time.monotonic() + options.seconds
    report = {"arguments": {name: str(value) for name, value in vars(options).items()}, "parts": {}}
    write(options.output, report)
    report["machine"] = describe_machine(options)
    for name in options.parts:
        run_part(name, argv, options, report, deadline)
    print(f"\nwritten to {options.output}")
    wrong = [f"{name}: {part['status']}" for name, part in report["parts"].items() if part["status"] != "done"]
    for name, part in report["parts"].items():
        wrong += [f"{name}: {row['name']} is WRONG" for row in part["rows"] if row.get("verdict") == "WRONG"]
    print("\n".join(dict.fromkeys(wrong)) or "all parts are done, and nothing was found wrong")
    return 1 if wrong else 0


def run_inside(options: argparse.Namespace) -> None:
    """One part in this process; each of its rows becomes a line of --output."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --device cpu with TRITON_INTERPRET=1 makes a dry run")
    module, function = PARTS[options.inside]
    with options.output.open("a") as lines:

        def emit(row: dict) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        getattr(importlib.import_module(module), function)(options, emit)


def run_part(name: str, argv: list[str], options: argparse.Namespace, report: dict, deadline: float) -> None:
    """One part in a process of its own, until the deadline; its rows are put into the report as they come."""
    part = report["parts"][name] = {"status": "not run: out of time", "seconds": 0.0, "rows": []}
    begun = time.monotonic()
    print(f"\n{name}")
    if begun < deadline:
        part["status"] = "running"
        with tempfile.TemporaryDirectory() as folder:
            rows, errors = pathlib.Path(folder) / "rows", pathlib.Path(folder) / "errors"
            rows.touch()
            command = [sys.executable, str(HERE / "check_kernels.py"), *argv, "--inside", name, "--output", str(rows)]
            with errors.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.2)
                    take_rows(rows, part, options, report)
                part["status"] = {None: "out of time", 0: "done"}.get(process.poll(), "failed")
                if process.poll() is None:
                    process.kill()
            take_rows(rows, part, options, report)
            if part["status"] != "done":
                part["error"] = errors.read_text(errors="replace")[-4000:]
                print(part["error"])
    part["seconds"] = time.monotonic() - begun
    write(options.output, report)
    print(f"{name}: {part['status']} after {part['seconds']:.0f} s")


def take_rows(rows: pathlib.Path, part: dict, options: argparse.Namespace, report: dict) -> None:
    """Puts the rows that are new into the report, the file and on the screen."""
    whole = [line for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
    for line in whole[len(part["rows"]) :]:
        row = json.loads(line)
        part["rows"].append(row)
        print(describe(row))
        write(options.output, report)


def describe(row: dict) -> str:
    """A row as a line of text."""
    said = [f"{row['name']:44}"]
    if "seconds" in row:
        said.append(f"{row['seconds'] * 1e3:10.3f} ms")
    for name in ("share_of_copy_bandwidth", "share_of_product_flops"):
        if name in row:
            said.append(f"{row[name]:5.0%} of {name.rpartition('_of_')[2].replace('_', ' ')}")
    if row.get("extra_bytes") is not None:
        said.append(f"{row['extra_bytes'] / 2**20:,.0f} MiB")
    if "tokens_per_second" in row:
        said.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "verdict" in row:
        said.append(f"{row['verdict']}, error / bound {row['worst']:.3g}")
    names = ("path", "kind", "top_k", "temperature", "divergence", "ranks", "detail", "version")
    return "  ".join([*said, *(f"{name} {row[name]}" for name in names if name in row)])


def write(path: pathlib.Path, report: dict) -> None:
    """The report so far, whole at every moment."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)


def describe_machine(options: argparse.Namespace) -> dict:
    import torch
    import triton

    described = {
        "commit": options.commit or output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed": output_of("git", "-C", str(ROOT), "status", "--porcelain", "megakd", "tools"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if options.device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    for name, value in described.items():
        print(f"{name:16} {value}")
    return described


def output_of(*command: str) -> str | None:
    """What a command prints; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
