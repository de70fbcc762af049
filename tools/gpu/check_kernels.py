"""Checks and times the Triton kernels on this machine's GPU: one command, one JSON file, exit status 1 if one is wrong.

    python tools/gpu/check_kernels.py --output kernels.json            # minutes; needs torch and triton, nothing else
    python tools/gpu/check_kernels.py --only-checks
    TRITON_INTERPRET=1 python tools/gpu/check_kernels.py --device cpu --tokens 3 --vocab 300 --top-k 8   # a dry run

1. Every pass over rows is compared with float64 on the GPU (kernel_checks.py): its own arithmetic, sizes that no tile
   divides, 2^18 columns, more than 2^31 elements, poisoned outputs.
2. A large copy gives the bandwidth, counting bytes read and bytes written. The floor of a pass is the bytes it has to
   move over that bandwidth: 2 a logit for a read of bfloat16.
3. Every pass, and what is built of them, is timed: median of single runs on an idle device between device events, after
   warming up, on logits that no cache holds; for the first shape also kernel by kernel. No time is asserted.
"""

import argparse
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from megakd.kernels import VocabShard, kd_loss, paths, select_top_k, selection
from megakd.kernels.predictions import predict

CHOOSE = paths.choose
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {"kd_loss forward and backward, in place": 1.25, "select_top_k": 3.0}  # times the floor; see docs/loss.md


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run, interpreted")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192, 256], help="T of the timings (default 8192 256)"
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[131072], help="V of the timings (default 131072)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 1024], help="K of the timings (default 64 1024)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="of the logits (default bf16)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 2.0], help="(default 1 2)")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each pass (default 20)")
    parser.add_argument("--only-checks", action="store_true")
    parser.add_argument("--only-timings", action="store_true")
    parser.add_argument("--no-torch", action="store_true", help="do not time the same passes in plain PyTorch")
    parser.add_argument("--commit", help="what to record, where there is no git (default: git rev-parse HEAD)")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu with TRITON_INTERPRET=1 makes a dry run")
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    if max(options.top_k) > min(options.vocab):
        parser.error(f"--top-k {max(options.top_k)} is above --vocab {min(options.vocab)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    report = {"machine": describe_machine(options), "arguments": {k: str(v) for k, v in vars(options).items()}}
    if not options.only_timings:
        from kernel_checks import run_checks

        report["checks"] = run_checks(options.device, small=options.device == "cpu")
        for check in report["checks"]:
            print("{verdict:5} {name:40} error / bound {worst:.3g}  {detail}".format(**check))
    if not options.only_checks:
        report["copy_bytes_per_second"] = copy_bandwidth(options)
        print(f"\ncopy: {report['copy_bytes_per_second'] / 1e12:.3f} TB/s, bytes read and written")
        report["timings"] = run_timings(options, report["copy_bytes_per_second"])
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {options.output}")
    wrong = [check["name"] for check in report.get("checks", []) if check["verdict"] != "right"]
    print(
        f"WRONG: {', '.join(wrong)}" if wrong else "all checks passed" if "checks" in report else "nothing was checked"
    )
    return 1 if wrong else 0


def describe_machine(options: argparse.Namespace) -> dict:
    import triton

    commit = options.commit or output_of("git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD")
    described = {
        "commit": commit,
        "changed": output_of("git", "-C", str(pathlib.Path(__file__).parents[2]), "status", "--porcelain", "megakd"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if options.device == "cuda":
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


def seconds_of(run, options: argparse.Namespace, prepare=None) -> float:
    """Median seconds of `run()`, from its start on an idle device to its end; `prepare()` comes before, untimed."""
    taken, warm_up = [], 3 if options.device == "cuda" else 0
    for _ in range(warm_up + options.repeats):
        if prepare:
            prepare()
        if options.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken[warm_up:])


def copy_bandwidth(options: argparse.Namespace) -> float:
    elements = 1 << (30 if options.device == "cuda" else 20)
    source = torch.randn(elements // 4, device=options.device).repeat(4).to(torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), options)


def run_timings(options: argparse.Namespace, bandwidth: float) -> list[dict]:
    timings = []
    shapes = [
        (tokens, vocab, top_k, dtype, temperature)
        for dtype in options.dtype
        for vocab in options.vocab
        for tokens in options.tokens
        for top_k in options.top_k
        for temperature in options.temperature
    ]
    for shape in shapes:
        tokens, vocab, top_k, dtype, temperature = shape
        print(f"\nT={tokens} V={vocab} K={top_k} {dtype} temperature {temperature:g}")
        for path in ("triton",) if options.no_torch or options.device == "cpu" else ("triton", "torch"):
            for name, logit_bytes, run, prepare in passes(options, path, *shape):
                taken = seconds_of(run, options, prepare)
                floor = logit_bytes * tokens * vocab / bandwidth
                ratio = taken / floor if floor else None
                timings.append(
                    {"pass": name, "path": path, "tokens": tokens, "vocab": vocab, "top_k": top_k, "dtype": dtype,
                     "temperature": temperature, "seconds": taken, "floor_seconds": floor, "ratio": ratio,
                     "target_ratio": TARGETS.get(name)}
                )  # fmt: skip
                beside = f"{ratio:6.2f} x floor" if ratio else ""
                if path == "triton" and shape == shapes[0] and options.device == "cuda":
                    timings[-1]["kernels"] = profile(run)
                print(f"{path:7} {name:42} {taken * 1e3:9.3f} ms  {beside}")
    return timings


def passes(options: argparse.Namespace, path: str, tokens: int, vocab: int, top_k: int, dtype: str, temperature: float):
    """Yields (name, bytes a logit that must move, what to run, what to do before each run)."""
    use_path(path)
    x, teacher = (random_logits(tokens, vocab, DTYPES[dtype], options.device, seed) for seed in (1, 2))
    fresh, size = x.clone(), x.element_size()
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3)).to(x.device)
    shard, row_passes, selection_passes = (
        VocabShard(0, vocab, vocab),
        paths.row_passes(x),
        selection.selection_passes(x),
    )
    targets = select_top_k(teacher, top_k, shard, temperature)
    supervised = torch.ones_like(labels, dtype=torch.bool)
    given = targets.ids_TK, labels, supervised, vocab, temperature
    stats = row_passes.statistics(x, *given)
    ones, at_one = (
        torch.ones(tokens, device=x.device),
        None if temperature == 1 else torch.ones(tokens, device=x.device),
    )
    factors = stats.max_T, ones, at_one, stats.entry_logits_TK, ones
    chunks = max(1, round(vocab**0.5))
    scan = selection_passes.scan_rows(teacher, top_k, shard, temperature)
    agreed = selection.share(scan.values_TL[None], top_k, 0)

    def loss(backward: bool):
        leaf = x.detach().requires_grad_()
        total = kd_loss(leaf, targets, labels, shard, ce_weight=0.1, inplace_backward=True).loss_T
        if backward:
            total.backward(ones)

    def restore():
        x.copy_(fresh)

    yield "rows.statistics", size, lambda: row_passes.statistics(x, *given), None
    yield "rows.backward, in place", 2 * size, lambda: row_passes.backward(x, *given, *factors, x), restore
    yield "rows.extremes", size, lambda: row_passes.extremes(x, labels, vocab), None
    yield "rows.summarize", size, lambda: row_passes.summarize(x, vocab, chunks, temperature), None
    yield "scan_rows", size, lambda: selection_passes.scan_rows(teacher, top_k, shard, temperature), None
    yield "take_entries", 0, lambda: selection_passes.take_entries(teacher, scan, *agreed, top_k, temperature), None
    yield "select_top_k", size, lambda: select_top_k(teacher, top_k, shard, temperature), None
    yield "kd_loss forward", size, lambda: loss(False), None
    yield "kd_loss forward and backward, in place", 3 * size, lambda: loss(True), restore
    yield "predict", size, lambda: predict(x, labels, shard), None


def random_logits(tokens: int, vocab: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    logits = torch.empty(tokens, vocab, dtype=dtype, device=device)
    for part in logits.split(256):  # never the whole in float32
        part.copy_(3 * torch.randn(part.shape, generator=generator, device=device))
    return logits


def use_path(path: str) -> None:
    """Makes megakd.kernels take this implementation from now on."""
    paths.choose = CHOOSE if path == "triton" else lambda _, plain, triton: importlib.import_module(plain)


def profile(run) -> list[dict]:
    """Device microseconds of every kernel of one `run()`, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [
        {"kernel": event.key, "calls": event.count, "microseconds": event.self_device_time_total}
        for event in profiler.key_averages()
    ]
    return sorted(kernels, key=lambda kernel: -kernel["microseconds"])


if __name__ == "__main__":
    sys.exit(main())
