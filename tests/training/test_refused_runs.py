"""Runs that are refused, on every rank alike: mistakes, teachers that know nothing, folders of another run."""

import json
import shutil

import pytest

from tests import forked
from tests.checkpoints.flips import flip
from tests.ranks import run_ranks
from tests.training import runs
from tests.training.runs import distil


def test_a_run_folder_in_use_is_refused(folder, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "owner.lock", "w") as file:
        file.write("node7 pid 12 job 34")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        messages = run_ranks(2, runs.train, runs.values(folder, tmp_path / "run", train__steps=1))
    assert "is in use by another launch (node7 pid 12 job 34)" in messages[0] and messages[0] == messages[1]
    config = runs.values(folder, tmp_path / "run", train__steps=1)
    assert run_ranks(2, runs.train, config) == [None, None]


def test_a_schedule_longer_than_its_epochs_is_refused(folder, tmp_path):
    config = runs.values(folder, tmp_path, train__epochs=0.1, schedule__warmup_steps=1000)
    del config["train"]["steps"]
    (message,) = run_ranks(1, runs.train, config)
    assert "ConfigError: the run has" in message and "schedule.warmup_steps: 1000 must be below" in message


def test_nothing_to_evaluate_is_refused(folder, tmp_path):
    file = runs.write_config(tmp_path, runs.values(folder, tmp_path / "nowhere"))
    done = forked.run("megakd.cli", "evaluate", file)
    assert done.returncode == 1 and "would be evaluated with random weights" in done.stderr
    assert not (tmp_path / "nowhere").exists()


REFUSED = {
    "missing teacher": (
        {"teacher__checkpoint": "nowhere"},
        ["CheckpointError: checkpoint nowhere does not exist", "hint:"],
    ),
    "long sequence": ({"data__sequence_length": 64}, ["64 tokens exceed", "max_sequence_length = 32"]),
    "top_k": ({"loss": {"top_k": 401}}, ["ConfigError: loss.top_k 401 exceeds the vocabulary of 400 ids"]),
    "no data": ({"data__train": "none/train"}, ["DataError", "none/train"]),
    "not finite": (
        {"optimizer__lr": 1e30, "optimizer__clip_grad": 0.0},
        ["TrainingError: step", "not finite", "hint: lower optimizer.lr"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_explained_on_every_rank(case, folder, teacher, tmp_path):
    changes, texts = REFUSED[case]
    messages = run_ranks(2, runs.train, distil(folder, teacher, tmp_path / "run", **changes))
    assert messages[0] == messages[1] and all(text in messages[0] for text in texts), messages
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_teacher_that_knows_nothing_is_refused(folder, teacher, tmp_path):
    fresh = runs.values(folder, tmp_path / "fresh", train__steps=1, optimizer__lr=1e-9, optimizer__min_lr=0.0)
    assert run_ranks(1, runs.train, fresh) == [None]
    config = distil(folder, tmp_path / "fresh", tmp_path / "run", tp=1)
    (message,) = run_ranks(1, runs.train, config)
    assert "TrainingError: the teacher's cross-entropy on the first batch" in message
    assert "counting how often each token occurs in it gives" in message
    assert not list((tmp_path / "run").glob("checkpoints/step_*")), "refused before the first update"
    config["teacher"]["allow_weak"] = True
    assert run_ranks(1, runs.train, config) == [None]


def train_without_the_teachers_head(rank, ranks, config):
    """As after a load that has left the output layer as it was drawn."""
    from megakd.assembly import setup

    upstream = setup.live_teacher

    def half_loaded(gpt, *common, **how):
        gpt.head_weight.data.normal_(0, 0.1)
        return upstream(gpt, *common, **how)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(setup, "live_teacher", half_loaded)
        return runs.train(rank, ranks, config)


def test_a_teacher_whose_output_layer_was_not_loaded_is_refused(folder, teacher, tmp_path):
    config = distil(folder, teacher, tmp_path / "run")
    messages = run_ranks(2, train_without_the_teachers_head, config)
    assert messages[0] == messages[1] and "knows nothing about this data" in messages[0]


def test_a_teacher_with_another_rotary_base_is_refused_by_a_student_that_knows_better(folder, teacher, tmp_path):
    from megakd.checkpoints.record import write_record

    last = sorted((teacher / "checkpoints").iterdir())[-1]
    shutil.copytree(last, tmp_path / "wrong")
    record = json.loads((tmp_path / "wrong" / "megakd.json").read_text())
    record["model"]["rotary_base"] = 2
    write_record(tmp_path / "wrong", record)
    config = distil(folder, tmp_path / "wrong", tmp_path / "run")
    config["student"] = {"checkpoint": str(teacher)}
    messages = run_ranks(2, runs.train, config)
    assert messages[0] == messages[1] and "has nothing to teach this student about this data" in messages[0], messages
    config["teacher"]["checkpoint"] = str(teacher)
    assert run_ranks(2, runs.train, config) == [None, None], "its own copy teaches nothing new, and is no mistake"
    config["train"]["steps"] += 1
    config["run"]["allow_change"] = ["train.steps", "teacher.checkpoint"]
    config["teacher"]["checkpoint"] = str(tmp_path / "wrong")
    assert run_ranks(2, runs.train, config) == [None, None], "a student may have overtaken its teacher, later"


def test_a_teacher_of_another_tokenizer_is_refused(folder, teacher, tmp_path):
    from megakd.runs.prepare import main

    for name in ("train", "validation"):
        source = str(runs.ROOT / "megakd" / "cli.py")
        if name == "train":
            main(["tokenizer", "--input", source, "--output", f"{tmp_path}/tokenizer.model", "--vocab-size", "390"])
        tokenizer, output = f"{tmp_path}/tokenizer.model", f"{tmp_path}/{name}"
        main(["text", "--input", source, "--tokenizer", tokenizer, "--output", output])
    (message,) = run_ranks(1, runs.train, distil(tmp_path, teacher, tmp_path / "run", tp=1))
    assert "CheckpointError: teacher" in message and "(400 ids)" in message and "(390 ids)" in message


def test_a_run_folder_belongs_to_one_run(folder, tmp_path):
    config = runs.values(folder, tmp_path, train__steps=2)
    assert run_ranks(1, runs.train, config) == [None]
    config["optimizer"]["lr"] = 2e-2
    config["run"]["resume"] = "auto"
    (message,) = run_ranks(1, runs.train, config)
    assert "optimizer.lr: was 0.01, is 0.02" in message
    config["run"]["resume"] = "never"
    assert "run.resume is never" in run_ranks(1, runs.train, config)[0]
    config["run"] |= {"resume": "auto", "allow_change": ["optimizer", "schedule", "train.steps"]}
    config["train"]["steps"], config["schedule"] = 3, {"kind": "constant"}
    assert run_ranks(1, runs.train, config) == [None]
    assert [line["step"] for line in runs.lines(tmp_path)] == [1, 2, 3]
    assert runs.lines(tmp_path)[-1]["lr"] == 0.02, "what the optimizer was saved with is not what it goes on with"
    config["run"] |= {"dir": str(tmp_path / "empty"), "resume": "required"}
    assert "holds no whole checkpoint" in run_ranks(1, runs.train, config)[0]


@pytest.mark.parametrize(("distributed", "precision"), [(True, "fp32"), (False, "fp32"), (False, "bf16")])
def test_an_allowed_change_of_the_optimizer_takes_effect(folder, tmp_path, distributed, precision):
    """Megatron goes on with the saved hyperparameters; of 0.19 with a KeyError."""
    from megakd.checkpoints.folder import last_checkpoint, read_checkpoint
    from megakd.checkpoints.torch_dist import common_values

    config = runs.values(folder, tmp_path, train__steps=6, run__stop_after=2, optimizer__distributed=distributed)
    config["train"]["precision"] = precision
    assert run_ranks(1, runs.train, config) == [None]
    changed = {"lr": 2e-2, "min_lr": 2e-3, "weight_decay": 0.5, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6}
    config["optimizer"] |= changed
    config["run"] |= {"allow_change": [f"optimizer.{name}" for name in changed], "stop_after": None}
    assert run_ranks(1, runs.train, config) == [None]
    fresh = config | {"run": config["run"] | {"dir": str(tmp_path / "fresh")}}
    assert run_ranks(1, runs.train, fresh) == [None]
    rates, wanted = ([line["lr"] for line in runs.lines(path)] for path in (tmp_path, tmp_path / "fresh"))
    assert rates[2:] == wanted[2:] and rates[:2] != wanted[:2]
    saved = common_values(read_checkpoint(last_checkpoint(tmp_path)))["optimizer"]
    groups = saved.get("optimizer", saved)["param_groups"]
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.8, 0.9, 1e-6)}
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert not distributed or {group["step"] for group in groups} == {6.0}


@pytest.mark.parametrize(("distributed", "precision"), [(True, "fp32"), (False, "fp32"), (True, "bf16")])
def test_an_optimizer_of_the_other_kind_is_refused_by_name(folder, tmp_path, distributed, precision):
    config = runs.values(folder, tmp_path, train__steps=4, run__stop_after=1, optimizer__distributed=distributed)
    config["train"]["precision"] = precision
    assert run_ranks(1, runs.train, config) == [None]
    config["optimizer"]["distributed"] = not distributed
    config["run"]["allow_change"] = ["optimizer.distributed"]
    (message,) = run_ranks(1, runs.train, config)
    assert f"was saved with optimizer.distributed={str(distributed).lower()}, whose state this run's" in message


def test_a_blend_is_not_continued_in_another_order(folder, tmp_path):
    """Before checkpoints said so, weighted blends had another order; other data have the one they had."""
    from megakd.checkpoints.record import write_record

    def forget_order(run_dir, step):
        checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
        record = json.loads((checkpoint / "megakd.json").read_text())
        order = record["data"].pop("order")
        write_record(checkpoint, record)
        return order

    blend = [0.5, f"{folder}/train", 0.5, f"{folder}/validation"]
    config = runs.values(folder, tmp_path, train__steps=4, run__stop_after=1, data__train=blend)
    assert run_ranks(1, runs.train, config) == [None] and forget_order(tmp_path, 1) == 2
    (message,) = run_ranks(1, runs.train, config)
    assert "step_00000001 was trained on data.train in order 1, this megakd reads it in order 2" in message
    config["run"]["allow_change"] = ["data.train"]
    assert run_ranks(1, runs.train, config) == [None]
    del config["run"]["allow_change"]
    assert run_ranks(1, runs.train, config) == [None] and forget_order(tmp_path, 3) == 2
    config["run"]["allow_change"] = ["data.train"]
    assert run_ranks(1, runs.train, config) == [None]
    data = max((tmp_path / "checkpoints" / "step_00000004").glob("*.distcp"), key=lambda file: file.stat().st_size)
    flip(data, 4 * data.stat().st_size)  # found while it is loaded: the one before is no more in order
    config["run"]["allow_change"], config["train"]["steps"] = ["train.steps"], 5
    (message,) = run_ranks(1, runs.train, config)
    assert "step_00000003 was trained on data.train in order 1" in message
    assert (tmp_path / "checkpoints" / "step_00000004.damaged").is_dir()

    plain = runs.values(folder, tmp_path / "plain", train__steps=2, run__stop_after=1)
    assert run_ranks(1, runs.train, plain) == [None]
    assert forget_order(tmp_path / "plain", 1) == 1 and run_ranks(1, runs.train, plain) == [None]
