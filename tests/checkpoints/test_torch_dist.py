"""Checkpoints: whole or not there, readable at every layout, refused when damaged."""

import json
import pathlib
import re

import pytest
import torch

from megakd.checkpoints.record import write_record
from megakd.errors import CheckpointError
from tests.ranks import run_ranks
from tests.training import small


def save(rank, ranks, run_dir, tp, pp, steps=2, fail=None):
    """Train a little and save as the loop does; returns the message of an error."""
    with small.layout(tp, pp) as groups:
        from megakd.training.checkpointing import Progress, Saver

        config = small.config(tp, pp, run__dir=str(run_dir), checkpoint__keep_last=2)
        run = small.student_step(config, groups)
        saver = Saver(config, run, config.student.model, tokenizer=None)
        progress = Progress()
        for i in range(steps):
            run(small.batch(i, groups, 2), step=i + 1, measure=False)
            progress.step, progress.tokens = i + 1, 10 * (i + 1)
        if fail:
            break_publish(fail)
        try:
            saver.save(progress, {"loss": 1.5})
        except CheckpointError as error:
            return str(error)


def break_publish(error):
    from megakd.checkpoints import folder

    def fail(*args, **kwargs):
        folder.publish = published
        raise error

    published, folder.publish = folder.publish, fail


def continued(rank, ranks, run_dir, tp, pp):
    """Resume from the last checkpoint and take two more steps; returns their metrics and the progress."""
    with small.layout(tp, pp) as groups:
        from megakd.checkpoints.folder import read_checkpoint
        from megakd.training.checkpointing import resume

        run = small.student_step(small.config(tp, pp), groups)
        progress = resume(run, read_checkpoint(run_dir))
        steps = range(progress.step, progress.step + 2)
        return [run(small.batch(i, groups, 2), step=i + 1, measure=True) for i in steps], progress.tokens


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert run_ranks(2, save, folder, 2, 1) == [None, None]
    return folder


def uninterrupted(rank, ranks, tp, pp):
    with small.layout(tp, pp) as groups:
        run = small.student_step(small.config(tp, pp), groups)
        return [run(small.batch(i, groups, 2), step=i + 1, measure=True) for i in range(4)][2:]


def test_resuming_on_the_same_layout_is_bit_equal(run_dir):
    (got, tokens), _ = run_ranks(2, continued, run_dir, 2, 1)
    assert got == run_ranks(2, uninterrupted, 2, 1)[0]
    assert tokens == 20


@pytest.mark.parametrize(("ranks", "tp", "pp"), [(1, 1, 1), (2, 1, 1), (2, 1, 2), (4, 2, 1)])
def test_resuming_on_another_layout_is_equal_to_rounding(run_dir, ranks, tp, pp):
    got, _ = run_ranks(ranks, continued, run_dir, tp, pp)[0]
    want = run_ranks(2, uninterrupted, 2, 1)[0]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=5e-5)


def load_into(rank, ranks, run_dir, section):
    with small.layout() as groups:
        from megakd.checkpoints.folder import read_checkpoint
        from megakd.checkpoints.torch_dist import load_weights

        gpt = small.build(small.student_section(**section), small.config(), groups, seed=9)
        try:
            load_weights(gpt, read_checkpoint(run_dir), groups)
        except CheckpointError as error:
            return str(error)
        return gpt.state_dict()["decoder.final_layernorm.weight"]


def test_weights_are_read_from_a_training_checkpoint(run_dir):
    (norm,) = run_ranks(1, load_into, run_dir, {})
    assert not torch.equal(norm, torch.ones_like(norm))


@pytest.mark.parametrize("section", [{"hidden_size": 64}, {"num_layers": 3}, {"tie_embeddings": False}])
def test_weights_of_another_model_are_refused(run_dir, section):
    (message,) = run_ranks(1, load_into, run_dir, section)
    assert re.search(r"is \[.*\], the model has \[|step_00000002 holds no tensor output_layer\.weight", message)
    assert "hint: is it" in message


def read(path):
    from megakd.checkpoints.folder import read_checkpoint

    return read_checkpoint(path)


def test_the_folder_describes_itself(run_dir):
    checkpoint = read(run_dir)
    assert checkpoint.path.name == "step_00000002" and checkpoint.step == 2 and checkpoint.training
    assert checkpoint.model.hidden_size == 32 and checkpoint.model.vocab_size == small.VOCAB
    assert checkpoint.metrics == {"loss": 1.5}


@pytest.fixture
def copy(run_dir, tmp_path):
    import shutil

    return pathlib.Path(shutil.copytree(run_dir / "checkpoints" / "step_00000002", tmp_path / "copy"))


def test_a_truncated_file_is_refused(copy):
    file = max(copy.glob("*.distcp"), key=lambda f: f.stat().st_size)
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.truncate(size - 1)
    with pytest.raises(CheckpointError, match=f"{file.name} is {size - 1} bytes long, {size} bytes were saved"):
        read(copy)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        read(copy)


def test_an_interrupted_save_is_not_a_checkpoint(copy, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    copy.rename(run / "checkpoints" / "step_00000002.incomplete")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint \(only an interrupted save"):
        read(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format_version=99), "format 99"),
        (lambda r: r.pop("step"), "cannot be read: KeyError"),
        (lambda r: r["model"].update(hidden_size="wide"), "cannot be read: ValidationError"),
    ],
)
def test_a_damaged_record_is_refused(copy, change, message):
    record = json.loads((copy / "megakd.json").read_text())
    change(record)
    write_record(copy, record)
    with pytest.raises(CheckpointError, match=message):
        read(copy)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        read(tmp_path / "nowhere")


def test_a_full_disk_fails_on_every_rank_and_leaves_nothing(tmp_path):
    messages = run_ranks(2, save, tmp_path, 2, 1, 1, OSError(28, "No space left on device"))
    assert messages[0] == messages[1] and "No space left" in messages[0] and "the disk is full" in messages[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_old_checkpoints_go_but_the_kept_stay(tmp_path):
    from megakd.checkpoints.folder import prune, step_folder, whole_checkpoints

    for step in (10, 20, 30, 40):
        step_folder(tmp_path, step).mkdir(parents=True)
        (step_folder(tmp_path, step) / "megakd.json").write_text("{}")
    prune(tmp_path, keep_last=2, keep=lambda step: step == 10)
    assert [f.name for f in whole_checkpoints(tmp_path)] == ["step_00000010", "step_00000030", "step_00000040"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
