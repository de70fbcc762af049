"""Single bits of a checkpoint flipped, one at a time, and the checkpoint loaded by two ranks as a launch loads it.

    python -m tests.checkpoints.flips --flips 1000

makes a checkpoint of a run (weights, optimizer, random states) and one of weights alone, both at tp 2, and prints what
came of the flips in each file.
"""

import argparse
import pathlib
import random
import tempfile
from collections import Counter

import torch

from megakd.errors import CheckpointError
from tests.ranks import close_pools, run_ranks
from tests.training import small

KINDS = ("run", "weights")


def flip(path: pathlib.Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def save(rank, ranks, folder, kind):
    """Step 2 of a run at tp 2, or its weights alone; returns where."""
    from megakd.checkpoints import folder as checkpoints
    from megakd.checkpoints import torch_dist
    from megakd.training.checkpointing import Progress, Saver

    with small.layout(tp=2) as groups:
        config = small.config(tp=2, run__dir=str(folder))
        run = small.student_step(config, groups)
        for i in range(2):
            run(small.batch(i, groups, 2), step=i + 1, measure=False)
        if kind == "run":
            Saver(config, run, config.student.model, tokenizer=None).save(Progress(step=2, tokens=20), {"loss": 1.5})
            return checkpoints.step_folder(folder, 2)

        def publish(written):
            parts = {"model": config.student.model, "step": 2, "training": False, "metrics": {}}
            checkpoints.publish(folder / "weights", tokenizer=None, written=written, **parts)

        weights = run.gpt.sharded_state_dict(metadata=torch_dist.sharding_metadata(groups))
        torch_dist.save(folder / "weights", {"model": weights}, groups, publish)
        return folder / "weights"


def choose(path: pathlib.Path, count: int, seed: int = 7) -> list[tuple[str, int]]:
    """Bits of all files of a checkpoint, as many of each."""
    files, bits = sorted(path.iterdir()), random.Random(seed)
    each = -(-count // len(files))
    return [(file.name, bits.randrange(8 * file.stat().st_size)) for file in files for _ in range(each)]


def outcomes(rank, ranks, path, kind, flips):
    """For each flip in turn: `refused`; `same`, nothing that was loaded differs; or `silent`."""
    from megakd.checkpoints.folder import read_checkpoint
    from megakd.checkpoints.torch_dist import load_weights
    from megakd.training.checkpointing import resume

    with small.layout(tp=2) as groups:
        run = small.student_step(small.config(tp=2), groups)

        def loaded():
            checkpoint = read_checkpoint(path)
            progress = resume(run, checkpoint) if kind == "run" else load_weights(run.gpt, checkpoint, groups)
            return checkpoint, progress, [tensor.clone() for tensor in tensors(run)]

        def outcome():
            with torch.no_grad():
                for tensor in tensors(run):
                    tensor.fill_(7)
            try:
                found = loaded()
            except CheckpointError as error:
                assert str(path) in str(error) and error.hint, error
                return "refused"
            same = found[:2] == whole[:2] and all(map(torch.equal, found[2], whole[2]))
            return "same" if same else "silent"

        whole, said = loaded(), []
        for name, bit in flips:
            for step in ("flip", "load", "flip back"):
                if step == "load":
                    said.append(outcome())
                elif rank == 0:
                    flip(path / name, bit)
                torch.distributed.barrier()
        assert outcome() == "same", "the flips were not undone"
        return said


def tensors(run) -> list[torch.Tensor]:
    """Weights and optimizer state of a rank."""
    found = [parameter.data for parameter in run.gpt.parameters()]
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for state in optimizer.optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return found


def table(folder: pathlib.Path, kind: str, count: int) -> tuple[dict[str, Counter], int]:
    """(file -> outcome -> flips, flips in all) of a new checkpoint; a rank's `refused` is every rank's."""
    path = run_ranks(2, save, folder, kind)[0]
    flips = choose(path, count)
    first, second = run_ranks(2, outcomes, path, kind, flips, timeout_seconds=60 + 10 * count)
    assert first == second, "one rank loaded what the other refused"
    found: dict[str, Counter] = {}
    for (name, _), outcome in zip(flips, first, strict=True):
        found.setdefault(name, Counter())[outcome] += 1
    return found, len(flips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000, help="in each of the two checkpoints")
    arguments = parser.parse_args()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            found, count = table(pathlib.Path(folder), kind, arguments.flips)
        print(f"{kind}: {count} flips, {dict(sum(found.values(), Counter()))}")
        for name, outcome in found.items():
            print(f"  {name}: {dict(outcome)}", flush=True)
    close_pools()


if __name__ == "__main__":
    main()
