"""Saving from the rank's own threads: no process is started, copies hold still, a failure is everybody's."""

import os
import pathlib

import pytest
import torch

from megakd.errors import CheckpointError
from tests.ranks import run_ranks
from tests.training import small


def children() -> set[str]:
    """Process ids whose parent is this process, zombies included."""
    found = set()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == os.getpid():
            found.add(folder.name)
    return found


class Watched:
    """The processes that exist while a rank's files are written."""

    def __init__(self, monkeypatch):
        from megakd.checkpoints.writer import ThreadedWriter

        self.seen, write_file = [], ThreadedWriter.write_file

        def watched(writer, number, items):
            self.seen.append(children())
            return write_file(writer, number, items)

        monkeypatch.setattr(ThreadedWriter, "write_file", watched)


def save_and_count(rank, ranks, run_dir, asynchronous):
    """Save under the eyes of Watched, change every weight at once, load again: (children seen, weights are the old)."""
    with small.layout() as groups, pytest.MonkeyPatch.context() as monkeypatch:
        from megakd.checkpoints.folder import read_checkpoint
        from megakd.checkpoints.torch_dist import load_weights
        from megakd.training.checkpointing import Progress, Saver

        watched = Watched(monkeypatch)
        config = small.config(run__dir=str(run_dir), checkpoint__asynchronous=asynchronous)
        run = small.student_step(config, groups)
        run(small.batch(0, groups, 2), step=1, measure=False)
        before = {name: value.clone() for name, value in run.gpt.state_dict().items() if value is not None}
        there = children()
        saver = Saver(config, run, config.student.model, tokenizer=None)
        saver.save(Progress(step=1), {})
        with torch.no_grad():
            for parameter in run.gpt.parameters():
                parameter.fill_(7.0)
        saver.finish()
        load_weights(run.gpt, read_checkpoint(run_dir), groups)
        after = run.gpt.state_dict()
        same = all(torch.equal(after[name], value) for name, value in before.items())
        return (
            len(watched.seen),
            watched.seen and max(map(len, watched.seen)) - len(there),
            len(children() - there),
            same,
        )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_starts_no_process_and_holds_what_was_there(asynchronous, tmp_path):
    results = run_ranks(2, save_and_count, tmp_path, asynchronous)
    assert results == [(2, 0, 0, True)] * 2
    assert len(list(tmp_path.glob("checkpoints/step_00000001/__*_*.distcp"))) == 4


def save_badly(rank, ranks, run_dir, asynchronous):
    """The second rank's second file cannot be written."""
    with small.layout() as groups, pytest.MonkeyPatch.context() as monkeypatch:
        from megakd.checkpoints.writer import ThreadedWriter
        from megakd.training.checkpointing import Progress, Saver

        write_file = ThreadedWriter.write_file

        def failing(writer, number, items):
            if (rank, number) == (1, 1):
                raise OSError(28, "No space left on device")
            return write_file(writer, number, items)

        monkeypatch.setattr(ThreadedWriter, "write_file", failing)
        config = small.config(run__dir=str(run_dir), checkpoint__asynchronous=asynchronous)
        run = small.student_step(config, groups)
        run(small.batch(0, groups, 2), step=1, measure=False)
        saver = Saver(config, run, config.student.model, tokenizer=None)
        try:
            saver.save(Progress(step=1), {})
            saver.finish()
        except CheckpointError as error:
            return str(error)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_file_that_cannot_be_written_fails_the_save_of_all(asynchronous, tmp_path):
    messages = run_ranks(2, save_badly, tmp_path, asynchronous)
    assert "No space left" in messages[0] and "the disk is full" in messages[0]
    assert "could not be saved" in messages[1]
    assert not list((tmp_path / "checkpoints").iterdir())


def each_reads_the_other(rank, ranks, run_dir):
    """What Megatron's own strategy writes and what megakd writes, read by Megatron's own loading and by megakd's."""
    with small.layout(tp=2) as groups:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        from megakd.checkpoints import torch_dist
        from megakd.checkpoints.folder import incomplete
        from megakd.checkpoints.loading import load_sharded
        from megakd.checkpoints.record import unrecorded

        whole = torch.arange(2 * 7 * 5, dtype=torch.bfloat16).view(14, 5)

        def state(data):
            part = data[rank * 7 : rank * 7 + 7]  # a view of the larger storage
            thing = ShardedObject("thing", {"rank": rank}, (2,), (rank,))
            return {"w": ShardedTensor.from_rank_offsets("w", part, (0, rank, 2)), "o": thing, "plain": 3}

        theirs, ours = (pathlib.Path(run_dir) / name for name in ("theirs", "ours"))
        if rank == 0:
            theirs.mkdir()
        torch.distributed.barrier(groups.tp)
        dist_checkpointing.save(state(whole), str(theirs))
        torch_dist.save(ours, state(whole), groups, lambda digests: incomplete(ours).rename(ours))
        described = []
        for folder in (theirs, ours):
            for back in (
                dist_checkpointing.load(state(torch.zeros_like(whole)), str(folder)),
                load_sharded(state(torch.zeros_like(whole)), unrecorded(folder), groups.dp_cp),
            ):
                assert torch.equal(back["w"], whole[rank * 7 : rank * 7 + 7])
                assert back["o"] == {"rank": rank} and back["plain"] == 3
            names = {f.name for f in folder.iterdir() if f.suffix != ".distcp"}
            described.append((names, sum(f.stat().st_size for f in folder.glob("*.distcp"))))
        return described


def test_each_reads_the_others_files(tmp_path):
    """They are the same to the byte in sum (which thing is in which file is not), where Megatron has a common.pt."""
    for (names, size), ours in run_ranks(2, each_reads_the_other, tmp_path):
        assert ours[0] == {"common.pt", ".metadata", "metadata.json"} == names | {"common.pt"}
        assert ours == (names, size) or "common.pt" not in names
