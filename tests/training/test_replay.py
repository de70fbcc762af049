"""A recorded step is computed again: equal at any layout, and a planted fault is found where it was planted."""

import pathlib
import shutil

import pytest
import torch

from tests import forked
from tests.ranks import run_ranks
from tests.training import runs

TOP_K = 50


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("teacher")
    config = runs.values(folder, run_dir, student__model__hidden_size=48, train__steps=40, checkpoint__every_steps=20)
    assert run_ranks(2, runs.train, config) == [None, None]
    return run_dir


@pytest.fixture(scope="module")
def recorded(folder, teacher, tmp_path_factory):
    """The config of a run at tp 2 that recorded its first and its third step."""
    config = distil(folder, teacher, tmp_path_factory.mktemp("run"), parallel__tp=2, run__record_steps=[1, 3])
    assert run_ranks(2, runs.train, config) == [None, None]
    return config


def distil(folder, teacher, run_dir, **changes):
    defaults = {"loss": {"top_k": TOP_K, "ce_weight": 0.25, "temperature": 2.0}, "train__steps": 4}
    defaults |= {"teacher__checkpoint": str(teacher)}
    return runs.values(folder, run_dir, **(defaults | changes))


def record_of(config, step=1) -> pathlib.Path:
    return pathlib.Path(config["run"]["dir"]) / "steps" / f"step_{step:08d}"


def at(config, run_dir, *, micro_batch_size=2, **parallel):
    """The config at another layout, and another folder for what is computed."""
    train = config["train"] | {"micro_batch_size": micro_batch_size}
    return config | {"parallel": parallel, "train": train, "run": config["run"] | {"dir": str(run_dir)}}


def replay(rank, ranks, path, config, fault=None, flags=None):
    """(comparison, whether something differs), or the text of an explained error; with a fault planted."""
    from megakd.config import Config
    from megakd.errors import MegakdError
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.models.groups import destroy_groups
    from megakd.training.replay import replay

    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            if fault:
                PLANTED[fault](monkeypatch, rank)
            return replay(pathlib.Path(path), Config.from_dict(config), runs.OneOfThePool(rank), flags or {})
    except MegakdError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_groups()


def change_batch(monkeypatch, name, value):
    """One id or label of the last sample of the batch."""
    from megakd.assembly import setup

    load_batch = setup.load_batch

    def changed(data, indices, length):
        loaded = load_batch(data, indices, length)
        if len(indices) == 2:
            loaded[name][1, 7] = value
        return loaded

    monkeypatch.setattr(setup, "load_batch", changed)


def change_model(monkeypatch, whose, change):
    from megakd.assembly import setup

    build_model = setup.build_model

    def built(*args, name, **options):
        gpt = build_model(*args, name=name, **options)
        if name == whose:
            with torch.no_grad():
                change(gpt)
        return gpt

    monkeypatch.setattr(setup, "build_model", built)


def other_rotary_base(gpt):
    channels = torch.arange(0, 8, 2, dtype=torch.float32)
    gpt.rotary_pos_emb.inv_freq = 1.0 / 500_000 ** (channels / 8)


def swap_heads(gpt):
    """The two query groups of the first layer change places, what reads them does not."""
    weight = gpt.decoder.layers[0].self_attention.linear_qkv.weight
    weight.copy_(weight.view(2, -1, weight.shape[1]).flip(0).reshape(weight.shape))


def drop_tail(monkeypatch, rank):
    from megakd import losses

    options = losses.options
    monkeypatch.setattr(losses, "options", lambda loss: options(loss) | {"tail": "drop"})


def double_gradient(monkeypatch, rank):
    """On rank 1, before the ranks add up."""
    from megakd.training import optimizer

    finalize = optimizer.finalize_model_grads

    def doubled(model, *args, **options):
        if rank == 1:
            for buffer in model[0].buffers:
                buffer.grad_data.mul_(2)
        return finalize(model, *args, **options)

    monkeypatch.setattr(optimizer, "finalize_model_grads", doubled)


def other_rank_reads(monkeypatch, rank):
    if rank == 1:
        change_batch(monkeypatch, "ids", 5)


def another_owner(monkeypatch, rank):
    """A launch on another machine takes the folder while this one computes."""
    from megakd.training import replay

    compute = replay.compute

    def computed(setup, step):
        for lock in pathlib.Path(setup.config.run.dir, "replays").glob("*.lock"):
            lock.write_text("somebody")
        return compute(setup, step)

    monkeypatch.setattr(replay, "compute", computed)


PLANTED = {
    "another owner": another_owner,
    "token": lambda monkeypatch, rank: change_batch(monkeypatch, "ids", 5),
    "label": lambda monkeypatch, rank: change_batch(monkeypatch, "labels", -100),
    "teacher's rotary base": lambda monkeypatch, rank: change_model(monkeypatch, "teacher", other_rotary_base),
    "student's rotary base": lambda monkeypatch, rank: change_model(monkeypatch, "student", other_rotary_base),
    "heads": lambda monkeypatch, rank: change_model(monkeypatch, "student", swap_heads),
    "tail": drop_tail,
    "gradient": double_gradient,
    "rank": other_rank_reads,
}
# fault -> layout to replay at, the first stage that differs, what is said of it
FOUND = {
    "token": ({}, "ids", "position 7: id "),
    "label": ({}, "labels", "position 7: label "),
    "teacher's rotary base": ({}, "teacher's targets", "logprob "),
    "student's rotary base": ({}, "student's losses", ": loss "),
    "heads": ({}, "student's losses", ": loss "),
    "tail": ({}, "student's losses", "the mean kd of all tokens: "),
    "gradient": ({"dp": 2}, "gradient norms", ".weight: "),
    "rank": ({"tp": 2}, "ids", "in the replay: rank 1 has other ids than rank 0: 5, not "),
}
STAGES = ["ids", "labels", "teacher's targets", "student's losses", "gradient norms"]


def said(text):
    """Stage -> equal, DIFFER (the first one) or differ."""
    lines = [line for line in text.splitlines() if line.startswith(tuple(STAGES))]
    found = {stage: line.removeprefix(stage).split()[0] for stage, line in zip(STAGES, lines, strict=True)}
    return found


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("ranks", "layout", "size"),
    [(1, {}, 4), (2, {"pp": 2}, 2), (2, {"tp": 1}, 1), (2, {"tp": 2, "sp": True}, 8), (2, {"fsdp": "both"}, 2)],
)
def test_a_step_at_another_layout_is_equal(recorded, step, ranks, layout, size, tmp_path):
    config = at(recorded, tmp_path, micro_batch_size=size, **layout)
    answers = run_ranks(ranks, replay, record_of(recorded, step), config)
    assert answers == [answers[0]] * ranks
    text, differs = answers[0]
    assert not differs and set(said(text).values()) == {"equal"} and text.endswith("the steps agree")
    assert "8 samples, 256 ids" in text and f"step {step} at tp 2" in text
    assert (tmp_path / "replays" / f"step_{step:08d}" / "step.json").is_file()


@pytest.mark.parametrize(
    "layout",
    [{"parallel": {"pp": 2, "vpp": 2}}, {"parallel": {"fsdp": "both"}}, {"teacher__parallel": {"tp": 2}}],
    ids=str,
)
def test_what_another_layout_has_recorded_is_equal(folder, teacher, layout, tmp_path):
    """Virtual stages are recorded as the layers that they are, rows of FSDP as whole parameters."""
    changes = {"student__model__num_layers": 4, "run__record_steps": [1], **layout}
    config = distil(folder, teacher, tmp_path / "run", train__steps=1, **changes)
    assert run_ranks(2, runs.train, config) == [None, None]
    again = at(config, tmp_path / "again", micro_batch_size=4)
    again["teacher"] = again["teacher"] | {"parallel": None}
    ((text, differs),) = run_ranks(1, replay, record_of(config), again)
    assert not differs and set(said(text).values()) == {"equal"}, text


@pytest.mark.parametrize("fault", FOUND)
def test_a_planted_fault_is_found_where_it_is(recorded, fault, tmp_path):
    layout, stage, words = FOUND[fault]
    ranks = 2 if layout else 1
    config = at(recorded, tmp_path, **{name: size for name, size in layout.items() if name != "dp"})
    text, differs = run_ranks(ranks, replay, record_of(recorded), config, fault)[0]
    seen, before = said(text), STAGES[: STAGES.index(stage)]
    assert differs and [seen[name] for name in [*before, stage]] == ["equal"] * len(before) + ["DIFFER"], text
    assert words in text and f"first difference: {stage}" in text, text


def test_the_worst_is_named_with_its_values(recorded, tmp_path):
    """A changed id is sample 7's (the last of the last micro-batch); half of the gradient is doubled."""
    text, _ = run_ranks(1, replay, record_of(recorded), at(recorded, tmp_path), "token")[0]
    line = next(line for line in text.splitlines() if "sample 7 of the batch (epoch 0, index " in line)
    assert "position 7: id " in line and line.endswith(" -> 5")
    text, _ = run_ranks(2, replay, record_of(recorded), at(recorded, tmp_path), "gradient")[0]
    assert 1.0 < float(text.partition(" (x ")[2].partition(")")[0]) < 2.0


def test_tolerances_are_the_users(recorded, tmp_path):
    config = at(recorded, tmp_path)
    text, differs = run_ranks(1, replay, record_of(recorded), config, None, {"losses": 1e-9})[0]
    assert differs and said(text)["student's losses"] == "DIFFER"
    text, differs = run_ranks(1, replay, record_of(recorded), config, "heads", {"losses": 1e3, "gradients": 1e3})[0]
    assert not differs, text


def test_a_record_of_another_run_is_refused_by_name(recorded, folder, tmp_path):
    path = record_of(recorded)
    config = at(recorded, tmp_path)
    other = config | {"loss": config["loss"] | {"top_k": 7}, "train": config["train"] | {"global_batch_size": 16}}
    (message,) = run_ranks(1, replay, path, other)
    assert message.startswith("ConfigError") and "loss.top_k 50 -> 7, train.global_batch_size 8 -> 16" in message
    other = config | {"student": {"model": config["student"]["model"] | {"hidden_size": 48, "rotary_base": 500}}}
    (message,) = run_ranks(1, replay, path, other)
    assert "of another model than this config: hidden_size 32 -> 48, rotary_base 10000.0 -> 500.0" in message
    (message,) = run_ranks(1, replay, path, config | {"teacher": None})
    assert "was recorded with a teacher, this config has none" in message
    (message,) = run_ranks(1, replay, path, config | {"student": {"checkpoint": config["teacher"]["checkpoint"]}})
    assert "began from weights that were drawn from run.seed, this config from the checkpoint" in message
    (message,) = run_ranks(1, replay, path.parent, config)
    assert "is no recorded step" in message and str(path) in message


def test_other_data_are_named_and_compared(recorded, folder, tmp_path):
    config = at(recorded, tmp_path)
    other = config | {"data": config["data"] | {"train": config["data"]["validation"]}}
    text, differs = run_ranks(1, replay, record_of(recorded), other)[0]
    assert differs and "note    : other data: train " in text and said(text)["ids"] == "DIFFER"
    assert "8 samples differ" in text


def test_the_weights_before_a_step_must_be_there(recorded, tmp_path):
    copy = shutil.copytree(record_of(recorded, 3), tmp_path / "copy")
    shutil.rmtree(copy / "weights")
    (message,) = run_ranks(1, replay, copy, at(recorded, tmp_path))
    assert message.startswith(f"StepError: {copy}/weights is missing: step 3 can be computed again only from")


def test_a_run_that_began_from_a_checkpoint_is_replayed_from_that_one(folder, teacher, tmp_path):
    config = distil(folder, teacher, tmp_path / "run", train__steps=1, run__record_steps=[1])
    config["student"] = {"checkpoint": str(teacher)}
    config["teacher"]["allow_weak"] = True
    assert run_ranks(1, runs.train, config) == [None]
    text, differs = run_ranks(2, replay, record_of(config), at(config, tmp_path / "again", tp=2))[0]
    assert not differs, text
    other = at(config, tmp_path / "other") | {"student": {"checkpoint": f"{teacher}/checkpoints/step_00000040"}}
    assert not run_ranks(1, replay, record_of(config), other)[0][1], "the same one by another name"
    other["student"] = {"checkpoint": f"{teacher}/checkpoints/step_00000020"}
    (message,) = run_ranks(1, replay, record_of(config), other)
    assert "began from the checkpoint" in message and f"from {teacher}/checkpoints/step_00000020, which" in message


def test_two_replays_into_one_folder_do_not_mix(recorded, tmp_path):
    """The second is refused before it computes; where there are no locks, the first before it writes."""
    from megakd.ownership import name, owning

    config, kept = at(recorded, tmp_path, tp=2), tmp_path / "replays"
    kept.mkdir()
    with owning(kept / "step_00000001.lock"):
        messages = run_ranks(2, replay, record_of(recorded), config)
        assert [path.name for path in kept.iterdir()] == ["step_00000001.lock"]
    for message in messages:
        assert message.startswith(f"ConfigError: {kept}/step_00000001 is being written by another replay ({name()})")
        assert "hint: wait for it to end, or give this one a folder of its own: run.dir=FOLDER" in message
    for message in run_ranks(2, replay, record_of(recorded), config, "another owner"):
        assert message.startswith("StepError: ") and f"{kept} was taken by another launch (somebody)" in message
    assert [path.name for path in kept.iterdir()] == ["step_00000001.lock"]
    assert not run_ranks(2, replay, record_of(recorded), config)[0][1]
    assert [path.name for path in kept.iterdir()] == ["step_00000001"], "the lock goes with its owner"


def test_a_student_with_dropout_is_not_recorded(folder, tmp_path):
    config = runs.values(folder, tmp_path, run__record_steps=[1], student__model__hidden_dropout=0.1)
    (message,) = run_ranks(1, runs.train, config)
    assert message.startswith("ConfigError: run.record_steps, but the student has {'hidden_dropout': 0.1}")


def test_a_step_that_is_left_out_leaves_no_record(folder, tmp_path, monkeypatch):
    from tests.training.test_broken import STEP, train_broken

    config = runs.values(
        folder, tmp_path, train__steps=STEP, train__max_skipped_steps=1, run__record_steps=[STEP - 1, STEP]
    )
    assert run_ranks(2, train_broken, config, float("nan")) == [None, None]
    assert [path.name for path in (tmp_path / "steps").iterdir()] == [f"step_{STEP - 1:08d}"]


def test_the_verb_says_it_with_its_exit_code(recorded, tmp_path, capsys):
    """Two ranks without a launcher; then the two records without any."""
    from megakd.errors import ConfigError, StepError
    from megakd.runs.replay import main

    config, path = runs.write_config(tmp_path, at(recorded, tmp_path / "again")), str(record_of(recorded, 3))
    arguments = ["replay", path, config, "train.micro_batch_size=1", "--targets", "1e-12"]
    ranks = forked.by_hand(2, "megakd.cli", *arguments, environment=runs.ENVIRONMENT, together=True)
    try:
        outputs = [process.communicate(120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 1], outputs
    assert "first difference: teacher's targets" in outputs[0] and "first difference" not in outputs[1], outputs
    again = str(tmp_path / "again" / "replays" / "step_00000003")
    assert main([path, again]) == 0 and "the steps agree" in capsys.readouterr().out
    assert main(["--targets", "1e-12", path, again]) == 1 and "teacher's targets" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="compared as they are, without parallel"):
        main([path, again, "parallel.tp=2"])
    with pytest.raises(StepError, match=r"is step 1, .* step 3"):
        main([str(record_of(recorded)), again])
