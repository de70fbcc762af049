"""Runs from config to checkpoint: curves, resume to the bit after kill -9, stopping."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import signal
import time

import pytest

from tests import forked
from tests.ranks import run_ranks
from tests.training import runs
from tests.training.runs import distil


def test_a_run_leaves_a_whole_run_folder(teacher):
    steps, validation = runs.lines(teacher), runs.lines(teacher, "validation")
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert [line["step"] for line in validation] == [20, 40, 60]
    assert validation[-1]["ce"] < validation[0]["ce"] and 0 < validation[-1]["ece"] < 1
    bins = validation[-1]["calibration"]
    gap = sum(abs(c - r) for c, r in zip(bins["confidence"], bins["right"], strict=True))
    assert len(bins["tokens"]) == 15 and sum(bins["tokens"]) == validation[-1]["tokens"]
    assert gap / sum(bins["tokens"]) == pytest.approx(validation[-1]["ece"], abs=1e-4)
    assert sum(bins["right"]) / sum(bins["tokens"]) == pytest.approx(validation[-1]["accuracy"])
    assert "kd" not in steps[0] and "agreement" not in validation[0], "no teacher, nothing said of one"
    assert json.loads((teacher / "stopped.json").read_text()) == {"step": 60, "finished": True}
    version = importlib.metadata.version("megatron-core")
    assert f"megatron-core {version}\n" in (teacher / "versions.txt").read_text()
    assert list((teacher / "tensorboard").iterdir())
    names = sorted(f.name for f in (teacher / "checkpoints").iterdir())
    assert names == ["step_00000040", "step_00000060"]
    assert {"megakd.json", "tokenizer.model", "metadata.json"} <= {
        f.name for f in (teacher / "checkpoints" / names[-1]).iterdir()
    }


def test_tensor_and_data_parallel_runs_from_one_checkpoint_have_one_curve(folder, teacher, tmp_path):
    curves = []
    wider = {"teacher__parallel": {"tp": 2}}
    layouts = ((1, 1, {}), (2, 2, {}), (4, 2, {}), (2, 1, {"parallel__cp": 2}), (2, 1, wider))
    for number, (ranks, tp, changes) in enumerate(layouts):
        config = distil(folder, teacher, tmp_path / str(number), tp, **changes)
        config["student"] = {"checkpoint": str(teacher)}
        assert run_ranks(ranks, runs.train, config) == [None] * ranks
        curves.append(runs.lines(tmp_path / str(number)) + runs.lines(tmp_path / str(number), "validation"))
    assert curves[0][0]["kd"] == pytest.approx(0, abs=1e-5), "the student starts as its own teacher"
    for curve in curves[1:]:
        runs.assert_close(curve, curves[0], rel=2e-4, abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(folder, teacher, tmp_path):
    config = distil(folder, teacher, tmp_path / "whole", train__steps=20, student__model__hidden_dropout=0.1)
    config["checkpoint"] = {"every_steps": 5, "keep_last": 10}
    assert run_ranks(2, runs.train, config) == [None, None]
    config["run"]["dir"] = str(tmp_path / "killed")
    killed = runs.by_hand(tmp_path, 2, "train", config)
    wait_for(tmp_path / "killed" / "checkpoints" / "step_00000010" / "megakd.json", killed)
    end_all(killed)
    assert len(runs.lines(tmp_path / "killed")) < 20, "killed too late to prove anything"
    again = runs.by_hand(tmp_path, 2, "train", config, "run.resume=required")
    assert_good(again)
    said = again[0].communicate()[0]
    assert "continuing from" in said and re.search(r"checkpoint of step 20: 0.0\d+ GB in \d+.\d s\n", said), said
    for kind in ("train", "validation"):
        assert runs.lines(tmp_path / "killed", kind) == runs.lines(tmp_path / "whole", kind)


def wait_for(path, processes, seconds=120):
    deadline = time.monotonic() + seconds
    try:
        while not path.exists():
            assert not any(process.poll() for process in processes), [p.communicate()[0] for p in processes if p.poll()]
            assert time.monotonic() < deadline, f"no {path}"
            time.sleep(0.02)
    except BaseException:
        end_all(processes)
        raise


def end_all(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(60)


def assert_good(processes):
    """All end by themselves, with exit code 0."""
    try:
        outputs = [process.communicate(120)[0] for process in processes]
    finally:
        end_all(processes)
    assert [process.returncode for process in processes] == [0] * len(processes), outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "asynchronous", "whom"),
    [(signal.SIGTERM, False, "torchrun"), (signal.SIGINT, True, "torchrun"), (signal.SIGUSR1, True, "one rank")],
)
def test_a_signal_ends_in_a_checkpoint_from_which_the_run_goes_on(
    number, asynchronous, whom, folder, teacher, tmp_path
):
    config = distil(folder, teacher, tmp_path / "run", train__steps=5000)
    config["checkpoint"] = {"every_steps": 3, "asynchronous": asynchronous}
    if whom == "torchrun":
        processes = [runs.launch(tmp_path, 2, "train", config)]
    else:
        processes = runs.by_hand(tmp_path, 2, "train", config)
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000003" / "megakd.json", processes)
    for _ in range(2):  # the launcher may repeat it
        processes[-1].send_signal(number)
        time.sleep(0.1)
    try:
        output = processes[0].communicate(timeout=120)[0]
    finally:
        end_all(processes)
    assert whom == "torchrun" or [process.returncode for process in processes] == [0, 0], output
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped["finished"] is False and 0 < stopped["step"] < 5000, output
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped['step']:08d}" / "megakd.json").exists(), output
    saved = re.search(
        rf"checkpoint of step {stopped['step']}: \S+ GB in \S+ s(, in \S+ s of which no step was taken)?\n", output
    )
    assert saved and bool(saved[1]) == asynchronous, output
    config["run"]["stop_after"] = 2
    assert run_ranks(2, runs.train, config) == [None, None]
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["step"] == stopped["step"] + 2


def test_background_saves_are_whole(folder, tmp_path):
    config = runs.values(folder, tmp_path, train__steps=6)
    config["checkpoint"] = {"every_steps": 2, "keep_last": 9, "asynchronous": True}
    assert run_ranks(2, runs.train, config) == [None, None]
    names = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000006"]
    for name in names:  # not the step at which the save was done
        assert json.loads((tmp_path / "checkpoints" / name / "megakd.json").read_text())["step"] == int(name[5:])
    shutil.rmtree(tmp_path / "checkpoints" / names[-1])
    before = runs.lines(tmp_path)
    assert run_ranks(2, runs.train, config) == [None, None]
    assert runs.lines(tmp_path) == before


FULL = """
import os, sys
from megakd.cli import main
from megakd.megatron_on_cpu import install
install("cpu")
from megakd.checkpoints import torch_dist
def full(*args, **kwargs):
    raise OSError(28, "No space left on device")
if os.environ["RANK"] == "0":
    torch_dist.write_plain = full
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_for_rank_0_alone_ends_all_ranks(folder, tmp_path):
    """The others wait in Megatron for rank 0, and end with the launch."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    config = runs.values(folder, tmp_path / "run", train__steps=1)
    processes = runs.by_hand(tmp_path, 2, "train", config, program=script)
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        end_all(processes)
    assert processes[0].returncode == 1  # the other may have left before, outputs
    assert "CheckpointError: checkpoint" in outputs[0] and "the disk is full" in outputs[0], outputs
    assert "rank 1 stopped: rank 0 failed with CheckpointError" in outputs[1], outputs
    assert not (tmp_path / "run" / "checkpoints" / "step_00000001").exists()


def test_the_last_validation_is_in_the_last_checkpoint(teacher):
    from megakd.checkpoints.folder import read_checkpoint

    record = json.loads((read_checkpoint(teacher).path / "megakd.json").read_text())
    assert record["data"]["template"] == "{input} {output}"
    assert read_checkpoint(teacher).metrics["ce"] == runs.lines(teacher, "validation")[-1]["ce"]


def test_some_checkpoints_are_kept_for_good(folder, tmp_path):
    config = runs.values(folder, tmp_path, train__steps=11)
    config["checkpoint"] = {"every_steps": 2, "keep_last": 1, "keep_best": False, "keep_every": 4}
    assert run_ranks(1, runs.train, config) == [None]
    assert sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir()) == [4, 8, 11]


@pytest.mark.parametrize("rate", [0.01, 5.0])  # with the first the last step is the best, and with the second it may be
def test_epochs_and_the_best_checkpoint(rate, folder, tmp_path):
    config = runs.values(folder, tmp_path, train__epochs=0.5, eval__every_steps=2)
    del config["train"]["steps"]
    config["checkpoint"] = {"keep_last": 1}
    config["optimizer"] = {"lr": rate}
    assert run_ranks(1, runs.train, config) == [None]
    validation = runs.lines(tmp_path, "validation")
    best = min(validation, key=lambda line: line["loss"])["step"]
    kept = {int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, validation[-1]["step"]}


def test_evaluate_and_generate_read_what_train_wrote(folder, teacher, tmp_path):
    config = distil(folder, teacher, teacher, tp=2, loss={"top_k": runs.PIECES})
    assert_good(runs.by_hand(tmp_path, 2, "evaluate", config))
    scores = json.loads((teacher / "evaluations.jsonl").read_text().splitlines()[-1])
    assert scores["kd"] == pytest.approx(0, abs=1e-5) and scores["agreement"] == 1
    assert scores["ce"] == pytest.approx(runs.lines(teacher, "validation")[-1]["ce"], rel=1e-4)
    lines = teacher / "evaluations.jsonl"
    lines.rename(tmp_path / "kept")
    lines.mkdir()  # as a disk that is full, or a folder of another user
    processes = runs.by_hand(tmp_path, 2, "evaluate", config, "--json")
    try:
        said, _ = [process.communicate(120)[0] for process in processes]
    finally:
        end_all(processes)
        lines.rmdir()
        (tmp_path / "kept").rename(lines)
    assert processes[0].returncode == 1  # the other may have left before
    printed = [line for line in said.splitlines() if line.startswith('{"student"')]
    assert [json.loads(line)["ce"] for line in printed] == [scores["ce"]]
    assert "the figures above could not be appended in run.dir" in said and "Traceback" not in said, said
    generate = ["megakd.cli", "generate", "--checkpoint", str(teacher), "--prompt", "def main(", "--device", "cpu"]
    output = forked.run(*generate, "--max-new-tokens", 8)
    assert output.returncode == 0, output.stderr
    assert output.stdout.startswith("def main(") and len(output.stdout) > len("def main(") + 4
    refused = forked.run(*generate, "--max-new-tokens", 32)
    assert (
        refused.returncode == 1
        and "leaves no room for a prompt" in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_the_last_line_cut_off_by_a_kill_is_dropped(tmp_path):
    from megakd.training.metrics import drop_lines_after

    file = pathlib.Path(tmp_path) / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    drop_lines_after(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def losses_that_apply(rank, ranks, config):
    """The loss section that a run without a teacher goes by, and what it says about it."""
    import logging.handlers

    from megakd.config import Config
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.assembly.setup import LOG, loss_of

    said, level = logging.handlers.BufferingHandler(9), LOG.level
    LOG.addHandler(said)
    LOG.setLevel(logging.INFO)
    try:
        return loss_of(Config.from_dict(config)).model_dump(), [record.getMessage() for record in said.buffer]
    finally:
        LOG.removeHandler(said)
        LOG.setLevel(level)


def test_teacher_null_alone_is_the_baseline_on_the_data(folder, tmp_path):
    """The comparison everyone makes: the same config, with `teacher=null` and nothing else."""
    section = {"top_k": 5, "kd_weight": 3.0, "ce_weight": 0.2, "logits_memory_budget_bytes": 4321}
    with_loss = runs.values(folder, tmp_path / "a", train__steps=3, loss=section, teacher=None)
    ((applied, said),) = run_ranks(1, losses_that_apply, with_loss)
    assert (applied["kd_weight"], applied["ce_weight"], applied["logits_memory_budget_bytes"]) == (0.0, 1.0, 4321)
    without = "without effect: loss.top_k, loss.kd_weight, loss.ce_weight"
    assert said == [f"there is no teacher: the loss is cross-entropy alone, {without}"]
    budget = {"logits_memory_budget_bytes": 4321}  # which decides how the loss is rounded
    for config in (with_loss, runs.values(folder, tmp_path / "b", train__steps=3, loss=budget)):
        assert run_ranks(1, runs.train, config) == [None]
    assert runs.lines(tmp_path / "a") == runs.lines(tmp_path / "b")
