"""Seconds to save and load a checkpoint, with digests and without: `python tools/benchmarks/checkpoint.py FOLDER`.

One rank writes a torch_dist folder of float32 tensors of the size of a large layer's and reads it back, from the page
cache (where the share of the digests is the largest there can be) and, "cold", after the kernel was told to forget the
files. Megatron's own save, by processes that it forks, is timed beside. Every round does all kinds, in turns; the
figures are medians, and the ratios are of the same round.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from unittest import mock

import torch
import torch.distributed as dist

from megakd import digests
from megakd.megatron_on_cpu import install

install("cpu")

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from megakd.checkpoints import folder, torch_dist  # noqa: E402
from megakd.checkpoints.loading import load_sharded  # noqa: E402
from megakd.checkpoints.record import Files, describe_files, unrecorded  # noqa: E402
from megakd.digests import FileDigests  # noqa: E402
from megakd.models.groups import build_groups  # noqa: E402
from megakd.publish import publish_written  # noqa: E402

WIDTH = 4096  # tensors of 64 MB


def describe(tensors: list[torch.Tensor]) -> dict:
    return {"model": {f"w{i}": ShardedTensor.from_rank_offsets(f"w{i}", tensor) for i, tensor in enumerate(tensors)}}


def save(path: pathlib.Path, tensors: list[torch.Tensor], groups) -> tuple[float, dict]:
    """Seconds, and the digests that were made."""
    made = {}

    def publish(written):
        made.update(describe_files(folder.incomplete(path), written)["files"])
        publish_written(folder.incomplete(path), path)

    started = time.perf_counter()
    torch_dist.save(path, describe(tensors), groups, publish)
    return time.perf_counter() - started, made


def save_upstream(path: pathlib.Path, tensors: list[torch.Tensor]) -> float:
    """Seconds of Megatron's own save, whose writers are processes that it forks."""
    path.mkdir()
    started = time.perf_counter()
    dist_checkpointing.save(describe(tensors), str(path))
    return time.perf_counter() - started


def load(path: pathlib.Path, files: Files, tensors: list[torch.Tensor], groups) -> float:
    into = [torch.zeros_like(tensor) for tensor in tensors]
    started = time.perf_counter()
    load_sharded(describe(into), files, groups.dp_cp)
    seconds = time.perf_counter() - started
    assert all(map(torch.equal, into, tensors)), path
    return seconds


class NoHash:
    """What takes the place of the hash where a save without digests is timed."""

    def update(self, data) -> None: ...

    def reset(self) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 32


def without_digests():
    return mock.patch.object(digests.xxhash, "xxh3_128", NoHash)


def forget(folder: pathlib.Path) -> None:
    """The page cache gives up what it has of a folder's files (they are on the disk already)."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(where: pathlib.Path, tensors: list[torch.Tensor], groups, rounds: int) -> list[dict[str, float]]:
    found = []
    for _ in range(rounds + 1):  # the first is not counted
        seconds = {}
        for name, context in (("save", contextlib.nullcontext()), ("save without digests", without_digests())):
            shutil.rmtree(where / name, ignore_errors=True)
            with context:
                seconds[name], made = save(where / name, tensors, groups)
            if name == "save":
                kept = {file: FileDigests(entry["bytes"], entry["digests"]) for file, entry in made.items()}
        shutil.rmtree(where / "upstream", ignore_errors=True)
        seconds["save by Megatron"] = save_upstream(where / "upstream", tensors)
        files = dataclasses.replace(unrecorded(where / "save"), digests=kept)
        for verify in ("always", "sampled", "never"):
            checked = dataclasses.replace(files, verify=verify)
            seconds[f"load {verify}"] = load(where / "save", checked, tensors, groups)
            forget(where / "save")
            seconds[f"cold load {verify}"] = load(where / "save", checked, tensors, groups)
        found.append(seconds)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="on the disk that is to be measured")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as where:
        dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=0, world_size=1)
        groups = build_groups(1, 1, seed=0)
        count = max(1, round(arguments.gigabytes * 1e9 / WIDTH**2 / 4))
        tensors = [torch.randn(WIDTH, WIDTH) for _ in range(count)]
        found = measure(pathlib.Path(where), tensors, groups, arguments.rounds)
        dist.destroy_process_group()
    median = {name: statistics.median(round_[name] for round_ in found) for name in found[0]}
    share = {"save": statistics.median(r["save"] / r["save without digests"] for r in found)}
    over_upstream = statistics.median(r["save"] / r["save by Megatron"] for r in found)
    for kind in ("load", "cold load"):
        for verify in ("always", "sampled"):
            share[f"{kind} {verify}"] = statistics.median(r[f"{kind} {verify}"] / r[f"{kind} never"] for r in found)
    result = {"bytes": count * WIDTH**2 * 4, "seconds": median, "over_without_digests": share}
    print(json.dumps(result | {"save_over_megatron": over_upstream}, indent=1))


if __name__ == "__main__":
    main()
