"""Damaged checkpoints of real runs: found by whoever reads them, on every rank, and gone back from."""

import logging
import pathlib
import shutil

import pytest

from megakd.errors import CheckpointError
from tests.checkpoints import flips
from tests.checkpoints.flips import flip
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", flips.KINDS)
def test_a_bit_that_flips_in_any_file_is_refused_or_without_effect(tmp_path, kind):
    """Of a run at tp 2 with its optimizer, and of weights alone; `python -m tests.checkpoints.flips` does more."""
    found, _ = flips.table(tmp_path, kind, 27)
    assert len(found) >= 7 and "__1_1.distcp" in found
    for name, outcomes in found.items():
        assert "silent" not in outcomes, name
        assert "same" not in outcomes or name == "megakd.json", "bits of white space in the record have no effect"
