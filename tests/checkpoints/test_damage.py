"""Damaged checkpoints of real runs: found by whoever reads them, on every rank, and gone back from."""

import logging
import pathlib
import random
import shutil

import pytest

from megakd.errors import CheckpointError, DamagedCheckpointError
from tests.ranks import run_ranks
from tests.training import small


def save_twice(rank, ranks, run_dir, tp, pp):
    """Two checkpoints, of steps 1 and 2, of a run that has its files."""
    with small.layout(tp, pp) as groups:
        from megakd.training.checkpointing import Progress, Saver

        config = small.config(tp, pp, run__dir=str(run_dir), checkpoint__keep_last=2)
        run, progress = small.student_step(config, groups), Progress()
        saver = Saver(config, run, config.student.model, tokenizer=None)
        for i in range(2):
            run(small.batch(i, groups, 2), step=i + 1, measure=False)
            progress.step = i + 1
            saver.save(progress, {"loss": 1.5 - i})


def resumed(rank, ranks, run_dir, tp, pp, mode):
    """The step that a launch continues from and its weights' sum, or the error; and what rank 0 says."""
    with small.layout(tp, pp) as groups:
        from megakd.checkpoints.folder import read_checkpoint
        from megakd.training.checkpointing import resume_newest

        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("megakd").addHandler(handler)
        config = small.config(tp, pp, run__dir=str(run_dir), run__resume=mode)
        run = small.student_step(config, groups)
        try:
            progress = resume_newest(run, read_checkpoint(run_dir), config)
            return progress.step, sum(float(p.detach().double().sum()) for p in run.gpt.parameters()), said
        except CheckpointError as error:
            return type(error).__name__, str(error), said
        finally:
            logging.getLogger("megakd").removeHandler(handler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, save_twice, folder, 2, 1)
    return folder


@pytest.fixture
def run_dir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path: pathlib.Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(run_dir):
    newest, before = (run_dir / "checkpoints" / f"step_0000000{step}" for step in (2, 1))
    flip(newest / "__1_0.distcp", 80_001)
    first, second = run_ranks(2, resumed, run_dir, 2, 1, "auto")
    assert first[0] == second[0] == 1
    words = first[2][0]
    assert "set aside as" in words and "step_00000002.damaged" in words and "__1_0.distcp is damaged between" in words
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [before.name, f"{newest.name}.damaged"]
    again = run_ranks(2, resumed, run_dir, 2, 1, "auto")
    assert [one[:2] for one in again] == [first[:2], second[:2]], "the first load left something of the damaged one"


def test_newest_only_refuses_a_damaged_checkpoint_on_every_rank(run_dir):
    flip(run_dir / "checkpoints" / "step_00000002" / "__1_0.distcp", 80_001)
    for kind, words, _ in run_ranks(2, resumed, run_dir, 2, 1, "newest_only"):
        assert "the newest checkpoint is damaged" in words and "__1_0.distcp" in words and "Damaged" in kind + words
    assert (run_dir / "checkpoints" / "step_00000002").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(run_dir):
    from megakd.training.fallback import check_nothing_is_passed_over

    for step in (1, 2):
        flip(run_dir / "checkpoints" / f"step_0000000{step}" / "__0_1.distcp", 8001)
    for _, words, _ in run_ranks(2, resumed, run_dir, 2, 1, "auto"):
        assert "holds no whole checkpoint any more: step_00000001.damaged, step_00000002.damaged set aside" in words
    with pytest.raises(CheckpointError, match="set aside as damaged"):
        check_nothing_is_passed_over(run_dir, [])


def flipped(rank, ranks, path, bits):
    """For each bit of each file, in turn: what a resuming launch makes of it. Returns those that have an effect unseen,
    and those that are noticed."""
    with small.layout(1, 1) as groups:
        from megakd.checkpoints.folder import read_checkpoint
        from megakd.training.checkpointing import resume

        run, silent, noticed = small.student_step(small.config(), groups), [], []
        whole = read_checkpoint(path)
        for name, bit in bits:
            flip(path / name, bit)
            try:
                checkpoint = read_checkpoint(path)
                resume(run, checkpoint)
                if checkpoint != whole:
                    silent.append((name, bit))
            except DamagedCheckpointError:
                noticed.append((name, bit))
            flip(path / name, bit)
        resume(run, read_checkpoint(path))
        return silent, noticed


@pytest.mark.slow
def test_a_bit_that_flips_in_any_file_of_a_run_is_noticed_or_without_effect(run_dir):
    path, bits = run_dir / "checkpoints" / "step_00000002", random.Random(7)
    files = sorted(path.iterdir())
    chosen = [(file.name, bits.randrange(8 * file.stat().st_size)) for file in files for _ in range(7)]
    ((silent, noticed),) = run_ranks(1, flipped, path, chosen, timeout_seconds=280)
    assert not silent
    missed = {name for name, bit in chosen if (name, bit) not in noticed}
    assert missed <= {"megakd.json"}, "bits of white space in the record alone have no effect"
