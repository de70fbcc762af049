"""How fast data is tokenized and read, and in how much memory.

    python tools/benchmarks/data.py --megabytes 1000 [--workers N] [--folder DIR]

Makes a prompt-response JSONL of that size from the Python standard library's sources, tokenizes it as a run would (in
a process of its own, whose memory is watched together with its workers'), then puts batches together. Nothing is
downloaded. Wall times are of this machine as busy as it is; CPU seconds (of all processes together) say what the work
itself takes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

from megakd.data.dataset import batch_length, load_batch
from megakd.data.order import batch_indices
from megakd.data.samples import PackedDataset, SampleDataset
from megakd.runs.prepare import main as prepare


def write_corpus(path: Path, size: int, seed: int = 0) -> None:
    """Five lines of code as the prompt, 3 to 40 more as the answer, until there are `size` bytes."""
    rng, lines = random.Random(seed), []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if not {"site-packages", "test", "tests"} & set(file.parts):
            lines += file.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
    written = 0
    with path.open("w", encoding="utf-8") as out:
        while written < size:
            start, answer = rng.randrange(len(lines) - 50), rng.randint(3, 40)
            record = {
                "input": "".join(lines[start : start + 5]),
                "output": "".join(lines[start + 5 : start + 5 + answer]),
            }
            written += out.write(json.dumps(record) + "\n")


def watch(command: list[str]) -> tuple[float, float, int]:
    """Run a command: (wall seconds, CPU seconds, peak of the summed resident memory of its processes in bytes)."""
    started, before = time.monotonic(), os.times()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        try:
            members = [family, *family.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in members))
        except psutil.Error:  # one of them ended meanwhile
            continue
        time.sleep(0.1)
    after = os.times()
    if child.returncode:
        sys.exit(f"{' '.join(command)}: exit code {child.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - started, cpu, peak


def measure_batches(name: str, data, sequence_length: int, batch: int = 64, steps: int = 50) -> None:
    """Print what one global batch costs; every batch is new, its pages may have to be read first."""
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        indices = batch_indices(1, step, batch, len(data))
        load_batch(data, indices, batch_length(data, indices))
    wall, cpu = (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
    print(f"{name}: {1e3 * cpu:.1f} ms CPU ({1e3 * wall:.1f} ms wall) a batch of {batch} x up to {sequence_length}")


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="keep the files here (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus, model, prefix = folder / "corpus.jsonl", folder / "t.model", folder / "tokens"
        write_corpus(corpus, arguments.megabytes * 1_000_000)
        flags = ["--output", str(model), "--vocab-size", str(arguments.vocab_size), "--max-bytes", "10000000"]
        prepare(["tokenizer", "--input", str(corpus), *flags])
        flags = ["--tokenizer", str(model), "--output", str(prefix), "--workers", str(arguments.workers)]
        wall, cpu, peak = watch([sys.executable, "-m", "megakd", "prepare", "samples", "--input", str(corpus), *flags])
        started = time.perf_counter()
        data = SampleDataset(prefix, arguments.sequence_length)
        opened = time.perf_counter() - started
        size, tokens = corpus.stat().st_size / 1e6, data.file.info.tokens
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {arguments.workers} workers")
        print(
            f"tokenized {size:,.0f} MB to {tokens:,} tokens, {len(data):,} samples: {wall:.0f} s wall, {cpu:.0f} s CPU"
        )
        print(f"  {size / wall:.2f} MB/s, {tokens / wall:,.0f} tokens/s; a CPU second: {size / cpu:.2f} MB, "
              f"{tokens / cpu:,.0f} tokens; peak memory of all processes {peak / 1e6:,.0f} MB")  # fmt: skip
        started = time.perf_counter()
        packed = PackedDataset(data, seed=1)
        seconds = time.perf_counter() - started
        print(
            f"opened in {opened:.2f} s; packed into {len(packed):,} in {seconds:.2f} s, {100 * packed.fill:.2f} % full"
        )
        measure_batches("samples", data, arguments.sequence_length)
        measure_batches("packed", packed, arguments.sequence_length)


if __name__ == "__main__":
    main()
