"""A stranger's checkpoint runs no code, whatever loads it, and says which file wanted to."""

import pickle
import shutil

import pytest
import torch

from tests import forked
from tests.checkpoints.planted import PLANTS, Plant, plant, record_files
from tests.ranks import run_ranks
from tests.runs.test_cache import record
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run folder with one checkpoint, saved by Megatron."""
    run_dir = tmp_path_factory.mktemp("trained")
    assert run_ranks(1, runs.train, runs.values(folder, run_dir, train__steps=1)) == [None]
    return run_dir


def as_teacher(folder, there, root):
    changes = {"teacher": {"checkpoint": str(there)}, "loss": {"top_k": 20}, "train__steps": 1}
    return run_ranks(1, runs.train, runs.values(folder, root / "run", **changes))[0]


def as_student(folder, there, root):
    config = runs.values(folder, root / "run", train__steps=1)
    config["student"] = {"checkpoint": str(there)}
    return run_ranks(1, runs.train, config)[0]


def as_resumed(folder, there, root):
    return run_ranks(1, runs.train, runs.values(folder, there, train__steps=2, run__allow_change=["train.steps"]))[0]


def as_recorded(folder, there, root):
    changes = {"teacher": {"checkpoint": str(there), "cache": str(root / "cache")}, "loss": {"top_k": 20}}
    return run_ranks(1, record, runs.values(folder, root / "run", **changes))[0]


def as_exported(folder, there, root):
    from megakd.converters.convert import Options, convert
    from megakd.errors import CheckpointError

    for form in ("nemo", "hf"):
        with pytest.raises(CheckpointError) as caught:
            convert(there, root / f"out.{form}", form, Options())
    return f"CheckpointError: {caught.value}"


USES = {"teacher": as_teacher, "student": as_student, "resumed": as_resumed, "recorded": as_recorded}


def planted(trained, root, kind):
    there = root / "theirs"
    shutil.copytree(trained, there)
    (checkpoint,) = (there / "checkpoints").glob("step_*")
    return there, plant(kind, checkpoint, root / "ran")


def refused(said, name, root):
    assert said is not None and said.startswith("CheckpointError: "), said
    assert name in said and "refers to posix.system" in said and "hint: a pickle that names it can run any code" in said
    assert not (root / "ran").exists(), "it ran"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [kind for kind in PLANTS if kind != "object"])
def test_nothing_runs_whatever_loads_it(kind, use, folder, trained, tmp_path):
    there, name = planted(trained, tmp_path, kind)
    refused(USES[use](folder, there, tmp_path), name, tmp_path)


@pytest.mark.parametrize("kind", ["metadata", "tensor"])
def test_nothing_runs_when_it_is_exported(kind, folder, trained, tmp_path):
    there, name = planted(trained, tmp_path, kind)
    refused(as_exported(folder, there, tmp_path), name, tmp_path)


def test_nothing_runs_from_a_random_state(folder, trained, tmp_path):
    there, name = planted(trained, tmp_path, "object")
    refused(as_resumed(folder, there, tmp_path), name, tmp_path)


@pytest.mark.parametrize("content", [bytes(120), b"", b"[1]", b'"' + b"x" * 5000 + b'"', b"[" * 10**5])
def test_a_format_that_is_none_is_named(content, folder, trained, tmp_path):
    """Zeros are what a power cut leaves of a file; the record is made to fit, or it would be found damaged before."""
    there = shutil.copytree(trained, tmp_path / "theirs")
    (checkpoint,) = (there / "checkpoints").glob("step_*")
    (checkpoint / "metadata.json").write_bytes(content)
    assert as_student(folder, there, tmp_path).startswith("DamagedCheckpointError: ")
    record_files(checkpoint)
    said = as_student(folder, there, tmp_path)
    assert said.startswith("CheckpointError: ") and "metadata.json" in said and "hint: " in said and len(said) < 600


def take_random_states(rank, ranks, states):
    """What is said of each; the last is a good one."""
    from tests.training import small

    said = []
    with small.layout():
        import pathlib
        import types

        import torch

        from megakd.errors import CheckpointError
        from megakd.training.checkpointing import set_random_state

        good = {"torch": torch.get_rng_state(), "device": torch.get_rng_state(), "tracker": {}}
        for state in (*states, good):
            try:
                whole = {**good, **state} if isinstance(state, dict) else state
                set_random_state(whole, types.SimpleNamespace(path=pathlib.Path("there")))
            except CheckpointError as error:
                said.append(str(error))
    return said


def test_a_random_state_of_another_kind_is_named():
    states = [None, [], {"torch": 3}, {"device": "x"}, {"tracker": 5}, {"tracker": {"a": 1}}, {"torch": None}]
    (said,) = run_ranks(1, take_random_states, states)
    assert len(said) == len(states)
    assert all(text.startswith("there holds no random state of a rank: ") for text in said)


def fail_on_one_rank(rank, ranks, there):
    """Rank 1 alone sees the planted folder."""
    from tests.training import small

    with small.layout() as groups:
        from megakd.checkpoints.folder import read_checkpoint
        from megakd.checkpoints.torch_dist import load_weights
        from megakd.errors import CheckpointError

        checkpoint = read_checkpoint(there[rank])
        config = small.config()
        gpt = small.build(checkpoint.model.model_dump(), config, groups, seed=3)
        try:
            load_weights(gpt, checkpoint, groups)
        except CheckpointError as error:
            return str(error)


def test_ranks_fail_together_when_one_of_them_cannot_read(trained, tmp_path):
    there, _ = planted(trained, tmp_path, "metadata")
    said = run_ranks(2, fail_on_one_rank, [trained, there])
    assert said[0].startswith("rank 1: ") and all("refers to posix.system" in text for text in said)


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_nothing_runs_in_a_launch(verb, folder, trained, tmp_path):
    there, name = planted(trained, tmp_path, "metadata")
    flags = ["--checkpoint", there, "--prompt", "def", "--max-new-tokens", 4, "--device", "cpu"]
    given = {"generate": flags, "evaluate": [runs.write_config(tmp_path, runs.values(folder, there))]}
    done = forked.run("megakd.cli", verb, *given[verb])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert name in done.stderr and "refers to posix.system" in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists(), "it ran"


def test_the_plants_are_alive(trained, tmp_path):
    """Read as Megatron and torch read them, each would have run."""
    there, _ = planted(trained, tmp_path, "metadata")
    (checkpoint,) = (there / "checkpoints").glob("step_*")
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    torch.save([Plant(tmp_path / "ran")], tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
