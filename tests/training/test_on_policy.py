"""Runs whose student writes what it learns from: as data to the bit, at any layout, through kills and stops."""

import json
import logging
import pathlib
import shutil

import pytest

from megakd.config import Config
from megakd.errors import ConfigError
from megakd.rollouts.kept import Kept
from megakd.rollouts.plan import Plan
from tests import forked
from tests.ranks import run_ranks
from tests.rollouts.endpoint import Endpoint
from tests.training import runs

PROMPTS = ["def main(", "import", "class Verb:", '    """The ', "raise ConfigError", "return", "for name in"]
NEW = 11
LONG = '{"prompt": "import"}\n{"prompt": "' + "x" * 60 + '"}\n'


@pytest.fixture(scope="module")
def prompts(folder):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def on_policy(folder, prompts, teacher, run_dir, tp=1, rollouts=None, **changes):
    section = {"prompts": str(prompts), "max_new_tokens": NEW, "n": 2, "top_p": 0.95, **(rollouts or {})}
    defaults = {"loss": {"top_k": 50, "divergence": "reverse_kl"}, "train__steps": 3, "data__train": None}
    return runs.distil(folder, teacher, run_dir, tp, rollouts=section, **(defaults | changes))


def kept(run_dir, step=0):
    path = pathlib.Path(run_dir) / "rollouts" / f"step_{step:08d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_rounding(entries):
    return [{k: v for k, v in entry.items() if k != "logprobs"} for entry in entries]


def saved(run_dir):
    """Every tensor of a run's last checkpoint: weights, and the optimizer's, whose first moment is the gradient."""
    from megakd.checkpoints.folder import last_checkpoint, read_checkpoint
    from megakd.checkpoints.layout import Place
    from megakd.checkpoints.torch_dist_reader import TorchDistReader

    checkpoint = read_checkpoint(last_checkpoint(run_dir))
    reader = TorchDistReader(checkpoint.path, checkpoint.files)
    return {key: reader.read(Place(key, (), ())) for key in reader.tensors}


def assert_equal_to_the_bit(one, other):
    import torch

    assert one.keys() == other.keys() and any("exp_avg" in key for key in one)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@pytest.fixture(scope="module")
def alone(folder, prompts, teacher, tmp_path_factory):
    """One step of a run on one rank, three completions at a time."""
    run_dir = tmp_path_factory.mktemp("alone")
    config = on_policy(folder, prompts, teacher, run_dir, rollouts={"concurrency": 3}, train__steps=1)
    assert run_ranks(1, runs.train, config) == [None]
    return run_dir


def test_what_is_kept_can_be_looked_at(alone):
    entries = kept(alone)
    assert [(e["prompt_number"], e["completion_number"]) for e in entries[:2]] == [(e, c) for e, c in
            [(entries[0]["prompt_number"], 0), (entries[0]["prompt_number"], 1)]]  # fmt: skip
    assert len({e["prompt_number"] for e in entries}) == 4 and len({tuple(e["completion_ids"]) for e in entries}) == 8
    assert {(e["step"], e["weights_step"]) for e in entries} == {(1, 0)}
    assert all(e["prompt"] == PROMPTS[e["prompt_number"]] for e in entries)
    (line,) = runs.lines(alone)
    lengths = [len(e["completion_ids"]) for e in entries]
    assert line["completion_tokens"] == pytest.approx(sum(lengths) / 8) and line["tokens"] == sum(lengths)
    assert line["completions_ended"] == sum(e["finish_reason"] == "stop" for e in entries) / 8
    assert line["completions_staleness"] == 1
    (whole,) = [json.loads(text) for text in (alone / "metrics.jsonl").read_text().splitlines() if '"train"' in text]
    assert min(whole[f"{name}_seconds"] for name in ("rollouts", "teacher", "student")) > 0
    assert sum(v for k, v in whole.items() if k.endswith("_seconds")) == pytest.approx(whole["seconds"], rel=1e-9)


def as_data(folder, teacher, source, run_dir, tp=1, **changes):
    """A run on what another has kept of its first step, which it reads in the same order."""
    from megakd.data.order import batch_indices

    lines = (source / "rollouts" / "step_00000000.jsonl").read_text().splitlines()
    ordered = [""] * len(lines)
    for line, (_, index) in zip(lines, batch_indices(1234, 0, len(lines), len(lines)), strict=True):
        ordered[index] = line
    path = run_dir.with_suffix(".jsonl")
    path.write_text("".join(f"{line}\n" for line in ordered))
    loss = {"top_k": 50, "divergence": "reverse_kl"}
    more = {"data__train": str(path), "train__steps": 1, "teacher__allow_weak": True, "loss": loss}
    return runs.distil(folder, teacher, run_dir, tp, **(more | changes))


@pytest.mark.parametrize(
    ("ranks", "tp", "loss"), [(2, 1, {"divergence": "reverse_kl"}), (2, 2, {"divergence": "jsd", "temperature": 2.0})]
)
def test_a_step_is_that_of_the_same_ids_as_data_to_the_bit(ranks, tp, loss, folder, prompts, teacher, tmp_path):
    loss = {"top_k": 50, **loss}
    config = on_policy(folder, prompts, teacher, tmp_path / "written", tp, train__steps=1, loss=loss)
    assert run_ranks(ranks, runs.train, config) == [None] * ranks
    data = as_data(folder, teacher, tmp_path / "written", tmp_path / "read", tp, loss=loss)
    assert run_ranks(ranks, runs.train, data) == [None] * ranks
    assert_equal_to_the_bit(saved(tmp_path / "written"), saved(tmp_path / "read"))
    (written,), (read,) = runs.lines(tmp_path / "written"), runs.lines(tmp_path / "read")
    assert written["grad_norm"] > 0 and {k: written[k] for k in read} == read


@pytest.mark.parametrize("axes", [{"fsdp": "teacher"}, {"tp": 2, "sp": True}, {"pp": 2}])
def test_completions_do_not_depend_on_layout_or_batch_size(axes, folder, prompts, teacher, alone, tmp_path):
    parallel = {f"parallel__{name}": size for name, size in axes.items() if name != "tp"}
    more = {"train__steps": 1, "train__micro_batch_size": 4, **parallel}
    config = on_policy(folder, prompts, teacher, tmp_path, axes.get("tp", 1), **more)
    assert run_ranks(2, runs.train, config) == [None, None]
    assert without_rounding(kept(tmp_path)) == without_rounding(kept(alone))
    runs.assert_close(runs.lines(tmp_path), runs.lines(alone), rel=2e-4, abs=1e-5)


def test_packed_rows_are_the_same_objective(folder, prompts, teacher, alone, tmp_path):
    """Eight completions of a step share fewer rows, and the ranks have equally many of them."""
    config = on_policy(folder, prompts, teacher, tmp_path, train__steps=1, data__packing=True)
    assert run_ranks(2, runs.train, config) == [None, None]
    assert without_rounding(kept(tmp_path)) == without_rounding(kept(alone))
    runs.assert_close(runs.lines(tmp_path), runs.lines(alone), rel=2e-4, abs=1e-5)


def test_completions_beside_data_from_weights_of_two_steps(folder, prompts, teacher, tmp_path):
    rollouts = {"fraction": 0.6, "sync_every": 2, "max_staleness": 2, "n": 3}
    config = on_policy(folder, prompts, teacher, tmp_path, rollouts=rollouts, data__train=f"{folder}/train",
                       loss={"top_k": 50, "ce_weight": 0.1}, train__steps=3)  # fmt: skip
    assert run_ranks(2, runs.train, config) == [None, None]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step_00000000.jsonl", "step_00000002.jsonl"
    ]  # fmt: skip
    first, second = kept(tmp_path), kept(tmp_path, 2)
    assert [e["step"] for e in first] == [1] * 5 + [2] * 5 and [e["step"] for e in second] == [3] * 5
    lines = runs.lines(tmp_path)
    assert [line["completions_staleness"] for line in lines] == [1, 2, 1]
    tokens = 0
    for line, entries in zip(lines, (first[:5], first[5:], second), strict=True):
        tokens += sum(len(e["completion_ids"]) for e in entries) + 3 * 32  # and three rows of running text
        assert line["tokens"] == tokens


def test_the_plan_asks_every_prompt_once_an_epoch_and_never_draws_twice():
    plan = Plan(prompts=7, samples=5, n=3, sync_every=4, seed=1, steps=42)
    asked = [place for step in range(42) for place in plan.completions(step)]
    assert len(set(asked)) == len(asked) == 210
    for epoch in range(10):
        places = asked[epoch * 21 : (epoch + 1) * 21]
        assert sorted(places) == [(p, epoch * 3 + c) for p in range(7) for c in range(3)]
        assert all(len({p for p, _ in places[i : i + 3]}) == 1 for i in range(0, 21, 3)), "a prompt's stand together"
    orders = {tuple(p for p, _ in asked[epoch * 21 : (epoch + 1) * 21 : 3]) for epoch in range(10)}
    assert len(orders) == 10
    assert [plan.window(step) for step in (0, 3, 4, 41)] == [range(4), range(4), range(4, 8), range(40, 42)]


def test_kept_files_go_that_a_checkpoint_knows_nothing_of(tmp_path, caplog):
    kept_files = Kept(str(tmp_path))
    line = {"step": 5, "weights_step": 4, "prompt_number": 1, "completion_number": 2, "prompt_ids": [3],
            "completion_ids": [4, 5], "finish_reason": "stop"}  # fmt: skip
    for step in (2, 4, 6):
        kept_files.write(step, [line | {"weights_step": step}])
    assert kept_files.read(4)[4][0].ids == (4, 5) and kept_files.read(3) is None
    kept_files.drop_after(4)
    assert sorted(path.name for path in kept_files.folder.iterdir()) == ["step_00000002.jsonl", "step_00000004.jsonl"]
    kept_files.path(4).write_text(kept_files.path(4).read_text()[:-9])
    with caplog.at_level(logging.WARNING):
        assert kept_files.read(4) is None
    assert "step_00000004.jsonl is damaged" in caplog.text
    kept_files.drop_after(None)
    assert not list(kept_files.folder.iterdir())


@pytest.mark.slow
def test_a_run_killed_while_it_writes_resumes_to_the_bit(folder, prompts, teacher, tmp_path):
    """From a checkpoint in the middle of what one state of the weights has written for."""
    config = on_policy(folder, prompts, teacher, tmp_path / "whole", rollouts={"sync_every": 2}, train__steps=6)
    config["checkpoint"] = {"every_steps": 3, "keep_last": 9}
    assert run_ranks(2, runs.train, config) == [None, None]
    config["run"]["dir"] = str(tmp_path / "killed")
    environment = runs.ENVIRONMENT | {"WRITES": "2", "TOKENS": "5"}
    arguments = ["train", runs.write_config(tmp_path, config)]
    launch = forked.by_hand(2, "tests.training.dying", *arguments, environment=environment, together=True)
    printed = [process.communicate(120)[0] for process in launch]
    assert any(process.returncode == -9 for process in launch), printed
    assert sorted(path.name for path in (tmp_path / "killed" / "rollouts").iterdir()) == [
        "step_00000000.jsonl", "step_00000002.jsonl"
    ]  # fmt: skip
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").glob("step_*")] == ["step_00000003"]
    (tmp_path / "killed" / "rollouts" / "step_00000002.jsonl.0123abcd.incomplete").write_text("torn")
    shutil.copy(tmp_path / "killed/rollouts/step_00000002.jsonl", tmp_path / "killed/rollouts/step_00000009.jsonl")
    assert run_ranks(2, runs.train, config) == [None, None]
    for step in (0, 2, 4):
        assert kept(tmp_path / "killed", step) == kept(tmp_path / "whole", step)
    assert len(list((tmp_path / "killed" / "rollouts").iterdir())) == 3
    assert runs.lines(tmp_path / "killed") == runs.lines(tmp_path / "whole")
    assert_equal_to_the_bit(saved(tmp_path / "killed"), saved(tmp_path / "whole"))


def train_until(rank, ranks, config, questions):
    """A run that is asked to stop at a question whether to stop."""

    class Asked(runs.OneOfThePool):
        left = questions

        def agree_to_stop(self):
            self.left -= 1
            return self.left == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "OneOfThePool", Asked)
        return runs.train(rank, ranks, config)


def test_a_stop_while_it_writes_ends_in_a_checkpoint_and_nothing_half_kept(folder, prompts, teacher, tmp_path, caplog):
    config = on_policy(folder, prompts, teacher, tmp_path / "run", train__steps=3)
    assert run_ranks(1, train_until, config, 4) == [None], "at the start, of two roll-outs and after a step"
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"step": 1, "finished": False}
    assert [path.name for path in (tmp_path / "run" / "rollouts").iterdir()] == ["step_00000000.jsonl"]
    assert run_ranks(1, runs.train, config) == [None]
    config["run"]["dir"] = str(tmp_path / "whole")
    assert run_ranks(1, runs.train, config) == [None]
    assert runs.lines(tmp_path / "run") == runs.lines(tmp_path / "whole")
    assert_equal_to_the_bit(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def served(*endpoints, **changes):
    reload = [{"path": "/reload", "json": {"model_path": "{folder}"}}]
    server = {"urls": [endpoint.url for endpoint in endpoints], "reload": reload, "dead_seconds": 2.0}
    return {"engine": "server", "server": server, "top_p": None, "max_new_tokens": 6, **changes}


@pytest.mark.slow
def test_a_server_writes_with_the_weights_of_the_moment(folder, prompts, teacher, tmp_path):
    """What it says of its tokens is what the student says of them, at every step whose weights it was given."""
    with Endpoint() as one, Endpoint() as other:
        config = on_policy(folder, prompts, teacher, tmp_path, 2, rollouts=served(one, other, sync_every=2),
                           optimizer__lr=3e-2)  # fmt: skip
        assert run_ranks(2, runs.train, config) == [None, None]
        weights = tmp_path / "rollouts" / "weights"
        assert one.folders == other.folders == [str(weights / name) for name in ("step_00000000", "step_00000002")]
        assert [path.name for path in weights.iterdir()] == ["step_00000002"]
        lines = runs.lines(tmp_path)
        assert [line["completions_staleness"] for line in lines] == [1, 2, 1]
        for line, fresh in zip(lines, (True, False, True), strict=True):
            assert (line["ce"] == pytest.approx(line["writer_ce"], rel=2e-4)) == fresh, line
        entries = kept(tmp_path) + kept(tmp_path, 2)
        asked = one.asked + other.asked
        assert sorted(body["prompt"] for body in asked) == sorted(entry["prompt_ids"] for entry in entries)
        assert len({body["seed"] for body in asked}) == len(asked) == 24
        assert all(len(entry["completion_ids"]) <= 6 for entry in entries)
        other.__exit__()
        config["train"]["steps"], config["run"]["allow_change"] = 5, ["train.steps"]
        config["rollouts"]["server"]["urls"] = [other.url]
        (message, _) = run_ranks(2, runs.train, config)
        assert (
            message.startswith("TrainingError: no server of rollouts.server.urls has listed") and other.url in message
        )
        config["rollouts"]["server"]["urls"] = [other.url, one.url]  # a dead one's prompts go to the others
        assert run_ranks(2, runs.train, config) == [None, None]
    assert [line["step"] for line in runs.lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"step": 5, "finished": True}


REFUSED = {
    "no completion": ({"n": 0}, {}, "rollouts.n: 0, expected integer >= 1"),
    "cold": ({"temperature": -1.0}, {}, "rollouts.temperature: -1.0, expected number >= 0"),
    "equal completions": ({"temperature": 0.0, "top_p": None}, {}, "rollouts.n: 2 completions of a prompt would be"),
    "no choice": ({"temperature": 0.0, "n": 1}, {}, "rollouts.top_p: 0.95 has no effect at temperature 0"),
    "fraction": ({"fraction": 1.5}, {}, "rollouts.fraction: 1.5, expected number > 0 and <= 1"),
    "no fraction": ({"fraction": 0.0}, {}, "rollouts.fraction: 0.0, expected number > 0 and <= 1"),
    "too old": ({"sync_every": 3, "max_staleness": 2}, {}, "rollouts.sync_every: 3 is above max_staleness = 2"),
    "long": ({"max_new_tokens": 33}, {}, "rollouts.max_new_tokens: 33 leaves no room for a prompt in 32 tokens"),
    "no data": ({"fraction": 0.5}, {}, "data.train: missing; only a run whose rollouts.fraction is 1 does without"),
    "no teacher": ({}, {"teacher": None}, "rollouts: given with no teacher; expected a live teacher"),
    "cache": ({}, {"teacher": {"cache": "c"}}, "rollouts: given with teacher.cache = c, which holds no such samples"),
    "own tokens": ({}, {"loss": {"top_k": 50, "ce_weight": 0.2}}, "loss.ce_weight: above 0 with rollouts.fraction = 1"),
    "record": ({}, {"run__record_steps": [1]}, "run.record_steps: [1] with rollouts"),
    "context": ({}, {"parallel__cp": 2}, "parallel.cp: 2 with rollouts; no model generates so"),
    "shards": ({}, {"parallel__fsdp": "both"}, "parallel.fsdp: both with rollouts; no model generates so"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(case):
    rollouts, changes, text = REFUSED[case]
    teacher = changes.pop("teacher", {"checkpoint": "t"}) if "teacher" in changes else {"checkpoint": "t"}
    with pytest.raises(ConfigError) as refused:
        Config.from_dict(on_policy("f", "p.jsonl", "t", "r", rollouts=rollouts, **changes) | {"teacher": teacher})
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("", {}, "DataError: {prompts} holds no record"),
        (LONG, {}, "{prompts}:2: a prompt of 60 tokens; expected 1 to 22"),
        ('{"prompt": ""}\n', {"data__on_error": "skip"}, "{prompts} holds no prompt that can be used"),
        (LONG[:21], {"rollouts": {"stop_tokens": ["<|end|>"]}}, "rollouts.stop_tokens <|end|> is no token"),
    ],
)
def test_prompts_and_stops_are_looked_at_before_a_step(text, changes, said, folder, teacher, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text)
    (message,) = run_ranks(1, runs.train, on_policy(folder, prompts, teacher, tmp_path / "run", **changes))
    assert said.format(prompts=prompts) in message
    assert not (tmp_path / "run" / "rollouts").exists()
