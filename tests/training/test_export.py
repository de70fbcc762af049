"""The end of a run in another format: through kills and stops, again after further steps, and what is refused."""

import json
import pathlib
import signal
import time

import pytest

from megakd.checkpoints.folder import read_checkpoint
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.config import Config
from megakd.errors import ConfigError
from megakd.planning.memory import checkpoint_bytes
from megakd.training.export import check_export
from tests.training import runs
from tests.training.test_runs import end_all, wait_for


def output_of(ranks, code=0):
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        end_all(ranks)
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), outputs
    return outputs[0]


def wait_for_end(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while any(pathlib.Path(f"/proc/{pid}/exe").exists() for pid in pids):
        assert time.monotonic() < deadline, "the exporting process outlives rank 0"
        time.sleep(0.05)


def stopped(run_dir):
    return json.loads((run_dir / "stopped.json").read_text())


@pytest.mark.slow
def test_an_export_that_was_killed_and_stopped_is_made_by_the_next_launch(folder, tmp_path):
    run_dir = tmp_path / "run"
    config = runs.values(folder, run_dir, train__steps=2, export__format="hf", checkpoint__asynchronous=True)
    killed = runs.by_hand(tmp_path, 2, "train", config)
    wait_for(run_dir / "huggingface.incomplete", killed)
    helpers = [pid for rank in killed for pid in runs.session_leaders(rank.pid)]
    end_all(killed)
    assert helpers
    wait_for_end(helpers)
    assert not (run_dir / "huggingface").exists() and not (run_dir / "stopped.json").exists()
    assert (run_dir / "checkpoints" / "step_00000002" / "megakd.json").exists()

    asked = runs.by_hand(tmp_path, 2, "train", config)
    wait_for(run_dir / "huggingface.incomplete" / "config.json", asked)
    asked[1].send_signal(signal.SIGTERM)
    assert "asked to stop while the student is exported" in output_of(asked)
    assert stopped(run_dir) == {"step": 2, "finished": False}
    assert not (run_dir / "huggingface").exists() and not (run_dir / "huggingface.incomplete").exists()

    said = output_of(runs.by_hand(tmp_path, 2, "train", config))
    assert "largest difference of a logit" in said and stopped(run_dir) == {"step": 2, "finished": True}
    record = json.loads((run_dir / "huggingface" / "megakd_conversion.json").read_text())
    assert (record["step"], record["model_type"]) == (2, "llama") and record["verified"]["tp"] == 1
    assert "was exported before" in output_of(runs.by_hand(tmp_path, 1, "train", config))


@pytest.mark.slow
def test_a_run_that_goes_on_is_exported_anew_and_the_best_is_not_the_last(folder, tmp_path):
    config = runs.values(
        folder, tmp_path, train__steps=2, export__format="nemo", export__verify=False, eval__every_steps=1
    )
    output_of(runs.by_hand(tmp_path, 1, "train", config))
    first = (tmp_path / "student.nemo").read_bytes()
    checkpoint = read_checkpoint(tmp_path)
    tensors = TorchDistReader(checkpoint.path, checkpoint.files).tensors.values()
    on_disk = sum(tensor.size.numel() * tensor.dtype.itemsize for tensor in tensors)
    assert on_disk == checkpoint_bytes(Config.from_dict(config), checkpoint.model), "as `megakd check` plans it"
    assert json.loads((tmp_path / "exported.json").read_text()) == {"format": "nemo", "step": 2}
    config["train"]["steps"], config["run"]["allow_change"] = 4, ["train.steps", "optimizer", "schedule"]
    config["optimizer"] = {"lr": 5.0, "clip_grad": 0.0}  # from here on it gets worse
    config["schedule"] = {"kind": "constant"}
    config["export"]["checkpoint"] = "best"
    assert "not verified" in output_of(runs.by_hand(tmp_path, 1, "train", config))
    best = min(runs.lines(tmp_path, "validation"), key=lambda line: line["loss"])["step"]
    assert best < 4 and json.loads((tmp_path / "exported.json").read_text()) == {"format": "nemo", "step": best}
    assert len(first) == len((tmp_path / "student.nemo").read_bytes())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"export__format": "hf", "student__model__qk_norm": True, "student__model__post_norms": True},
            "no Hugging Face architecture",
        ),
        ({"export__format": "nemo", "student__model__residual_multiplier": 0.5}, "NeMo"),
        (
            {"export": {"format": "hf", "checkpoint": "best"}, "data__validation": None},
            "data.validation is null; expected last",
        ),
        ({"export": {"checkpoint": "best"}}, "export.checkpoint: best, but format is null: nothing is exported"),
        ({"export": {"verify": False}}, "export.verify: false, but format is null: nothing is exported"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_built(changes, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        check_export(Config.from_dict(runs.values(tmp_path, tmp_path, **changes)))


def test_what_can_be_exported_is_not_refused(tmp_path):
    for name in ("hf", "nemo"):
        check_export(Config.from_dict(runs.values(tmp_path, tmp_path, export__format=name)))
