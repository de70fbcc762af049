"""What every part of check_kernels.py measures with: seconds, extra memory, the bandwidth of a copy, made-up logits."""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from megakd.kernels import paths

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHOOSE = paths.choose
WARM_UP = 3


class Clock:
    """Times and weighs one thing after another, and gives a row for each.

    Args:
        options: the command line's.
        emit: takes a row as soon as there is one.
        bandwidth: bytes a second that a large copy moves, read and written; measured where it is None.
    """

    def __init__(self, options: argparse.Namespace, emit: Callable[[dict], None], bandwidth: float | None = None):
        self.options, self.emit, self.cuda = options, emit, options.device == "cuda"
        self.bandwidth = bandwidth or copy_bandwidth(options)

    def row(self, name: str, run, *, floor_bytes: float | None = None, prepare=None, kernels: bool = False, **said):
        """Median seconds of `run()` beside the floor that memory sets, and what it allocates beyond what there is.

        Args:
            floor_bytes: what must be read and written at the least; None or 0: there is no such floor.
            prepare: called before each run, untimed.
            kernels: list the device's kernels too.
            said: goes into the row.
        Returns:
            The row.
        """
        extra_bytes = self.extra_bytes(run, prepare)
        seconds = seconds_of(run, self.options, prepare)
        row = {"name": name, **said, "seconds": seconds, "extra_bytes": extra_bytes}
        if floor_bytes:
            row["floor_seconds"] = floor_bytes / self.bandwidth
            row["share_of_copy_bandwidth"] = row["floor_seconds"] / seconds
        if kernels and self.cuda:
            row["kernels"] = profile(run)
        self.emit(row)
        return row

    def extra_bytes(self, run, prepare) -> int | None:
        """Most memory that a run had at one time beyond what there was before it; None (not measured) on a CPU."""
        if not self.cuda:
            return None
        if prepare:
            prepare()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def seconds_of(run, options: argparse.Namespace, prepare=None) -> float:
    """Median seconds of `run()`, from its start on an idle device to its end; `prepare()` comes before, untimed."""
    taken, warm_up = [], WARM_UP if options.device == "cuda" else 0
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
    """Bytes a second, read and written, of a copy that no cache holds."""
    elements = 1 << (30 if options.device == "cuda" else 20)
    source = torch.randn(elements // 4, device=options.device).repeat(4).to(torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), options)


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


def implementations(options: argparse.Namespace) -> Iterator[str]:
    """`triton` and `torch` in turn; megakd.kernels takes the one that has been yielded, and Triton in the end."""
    for name in ("triton",) if options.device == "cpu" else ("triton", "torch"):
        paths.choose = CHOOSE if name == "triton" else lambda _, plain, triton: importlib.import_module(plain)
        yield name
    paths.choose = CHOOSE


def random_logits(options: argparse.Namespace, seed: int) -> torch.Tensor:
    """[T, V] of the command line's size and dtype."""
    generator = torch.Generator(device=options.device).manual_seed(seed)
    logits = torch.empty(options.tokens, options.vocab, dtype=DTYPES[options.dtype], device=options.device)
    for part in logits.split(256):  # never the whole in float32
        part.copy_(3 * torch.randn(part.shape, generator=generator, device=options.device))
    return logits


def random_labels(options: argparse.Namespace) -> torch.Tensor:
    """[T]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, options.vocab, (options.tokens,), generator=generator).to(options.device)
