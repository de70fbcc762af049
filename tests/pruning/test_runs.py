"""`megakd prune` as a verb: a run's checkpoint cut, trained from, and what is refused before anything is computed."""

import json
import re

import pytest
import torch
import yaml

from megakd.checkpoints import folder as checkpoints
from megakd.checkpoints.record import read_record
from megakd.config import Config, Prune
from megakd.errors import ConfigError
from megakd.pruning.checks import as_teacher, check_config, check_sizes
from megakd.pruning.choose import most_important
from megakd.pruning.sizes import bounds, narrowed, problems, with_layers
from megakd.runs.prune import main
from tests.planning import models
from tests.ranks import run_ranks
from tests.training import runs
from tests.training.small import config as small

ASKED = {"num_layers": 2, "ffn_hidden_size": 40, "num_query_groups": 2, "samples": 5}
NO_DATA = {
    "data__train": None,
    "rollouts": {"prompts": "unused", "fraction": 1.0, "max_new_tokens": 8},
    "loss": {"top_k": 50, "ce_weight": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("teacher")
    changes = {"num_layers": 3, "num_query_groups": 4}
    changes = {f"student__model__{key}": size for key, size in changes.items()}
    assert run_ranks(2, runs.train, runs.values(folder, run_dir, train__steps=2, **changes)) == [None, None]
    return run_dir


def config_of(folder, teacher, tmp_path, **changes):
    defaults = {"prune": ASKED, "student": {"checkpoint": str(tmp_path / "student")}, "teacher__allow_weak": True}
    return runs.distil(folder, teacher, tmp_path / "run", **(defaults | changes))


def prune(rank, ranks, config):
    """One rank of the verb; returns the table, or the text of an explained error."""
    from megakd.errors import MegakdError
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.models.groups import destroy_groups
    from megakd.pruning.prune import prune as prune_model

    try:
        return prune_model(Config.from_dict(config), runs.OneOfThePool(rank), "megakd prune")
    except MegakdError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_groups()


def test_a_student_is_cut_at_tp_2_and_trained_from(folder, teacher, tmp_path):
    config = config_of(folder, teacher, tmp_path)
    table = run_ranks(2, prune, config)[0]
    assert table.splitlines()[1].split() == ["layers", "3", "2"], table
    student = checkpoints.read_checkpoint(tmp_path / "student")
    assert (student.model.num_layers, student.model.ffn_hidden_size, student.model.num_query_groups) == (2, 40, 2)
    assert student.model.kv_channels == 8 and student.tokenizer_path.is_file() and not student.training
    said = read_record(student.path)["pruning"]
    assert said["teacher"].startswith(str(teacher)) and said["asked"] == ASKED and said["data"]["samples"] == 5
    influence = said["importances"]["num_layers"]
    assert said["kept"]["num_layers"] == most_important(torch.tensor(influence), 2).tolist()
    rows = [[float(x) for x in row.split()] for row in said["importances"]["ffn_hidden_size"]]
    wanted = most_important(torch.tensor(rows), 40)[said["kept"]["num_layers"]].tolist()
    assert [[int(x) for x in row.split()] for row in said["kept"]["ffn_hidden_size"]] == wanted
    assert run_ranks(2, runs.train, config | {"train": config["train"] | {"steps": 2}}) == [None, None]
    trained = checkpoints.read_checkpoint(tmp_path / "run")
    assert trained.model == student.model and trained.step == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (NO_DATA, "data.train is null, and ffn_hidden_size, num_layers, num_query_groups are chosen by"),
        ({"prune": {"num_query_groups": 3}}, "prune.num_query_groups: 3 is not divisible by tp = 2; expected 2 or 4"),
        ({"data__tokenizer": "other"}, "was trained with tokenizer"),
        ({"data__train": "other"}, "other was written with tokenizer"),
        ({"data__train": "empty.txt"}, "empty.txt"),
    ],
    ids=["no data", "tp", "tokenizer", "data of another tokenizer", "empty data"],
)
def test_what_is_refused_leaves_nothing(changes, words, folder, teacher, tmp_path, monkeypatch):
    from megakd.runs.prepare import main as prepare

    text = str(runs.ROOT / "megakd" / "errors.py")
    prepare(["tokenizer", "--input", text, "--output", f"{tmp_path}/other.model", "--vocab-size", "340"])
    prepare(["text", "--input", text, "--tokenizer", f"{tmp_path}/other.model", "--output", f"{tmp_path}/other"])
    (tmp_path / "empty.txt").write_text("")
    names = {"other": f"{tmp_path}/other", "empty.txt": f"{tmp_path}/empty.txt"}
    changes = {key: names.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    if "data__tokenizer" in changes:
        changes["data__tokenizer"] += ".model"
    said = run_ranks(2, prune, config_of(folder, teacher, tmp_path, **changes))
    assert all("Error: " in text and words in text for text in said), said
    assert not list(tmp_path.glob("student*"))


def test_named_layers_need_no_data(folder, teacher, tmp_path):
    table = run_ranks(2, prune, config_of(folder, teacher, tmp_path, **NO_DATA, prune={"drop_layers": [1]}))[0]
    assert table.splitlines()[1].split() == ["layers", "3", "2"], table
    said = read_record(tmp_path / "student")["pruning"]
    assert said["kept"] == {"num_layers": [0, 2]} and said["importances"] == {} and said["data"] is None


def test_a_dry_run_prints_the_sizes_and_writes_nothing(folder, teacher, tmp_path, capsys):
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(config_of(folder, teacher, tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    main([str(tmp_path / "kd.yaml"), "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    seen = {row[0]: [cell.strip() for cell in row[1:] if cell] for row in rows}
    assert seen["feed-forward channels"] == ["64", "40"] and seen["hidden channels"] == ["32", "="]
    assert seen["query groups of 1 heads, 8 channels each"] == ["4", "2"]
    attention, block, norms = 3 * 2 * 8 * 32 + 2 * 8 * 32, 3 * 40 * 32, 2 * 32
    assert seen["parameters"][1].split()[0] == f"{2 * (attention + block + norms) + 32 + 400 * 32:,}"


@pytest.mark.parametrize(
    ("kind", "asked", "key", "words"),
    [
        ("llama", {}, "num_layers", "nothing is asked to be left out; expected num_layers below 4, hidden_size below"),
        ("llama", {"num_layers": 4}, "num_layers", "nothing is asked"),
        ("llama", {"num_layers": 5}, "num_layers", "5, but the model has 4 layers"),
        ("llama", {"drop_layers": [0, 1, 2, 3]}, "drop_layers", "all 4 layers; none would be left"),
        ("llama", {"drop_layers": [1, 4]}, "drop_layers", r"layers \[4\] do not exist; there are 4, counted from 0"),
        ("llama", {"keep_layers": [7]}, "keep_layers", r"layers \[7\] do not exist"),
        ("llama", {"hidden_size": 49}, "hidden_size", "49, but the model has 48 hidden channels"),
        ("llama", {"ffn_hidden_size": 87}, "ffn_hidden_size", "87 is not divisible by tp = 2; expected 86 or 88"),
        ("llama", {"num_query_groups": 1}, "num_query_groups", "1 is not divisible by tp = 2; expected 2"),
        ("llama", {"num_experts": 2}, "num_experts", "the model has no experts"),
        ("olmo2", {"num_query_groups": 2}, "num_query_groups", "a norm over all heads"),
        ("deepseek", {"num_query_groups": 2}, "num_query_groups", "attention is latent"),
        ("mixtral", {"ffn_hidden_size": 44}, "ffn_hidden_size", "every layer has experts instead"),
        ("mixtral", {"num_experts": 1}, "num_experts", "1, but a token is sent to 2 of them"),
        ("mixtral", {"shared_ffn_hidden_size": 2}, "shared_ffn_hidden_size", "no shared experts"),
        ("qwen2_moe", {"expert_ffn_hidden_size": 9}, "expert_ffn_hidden_size", "9 is not divisible by tp = 2"),
        ("qwen2_moe", {"shared_ffn_hidden_size": 21}, "shared_ffn_hidden_size", "expected 20 or 22"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_named(kind, asked, key, words):
    found = list(problems(models.section(kind), Prune(**asked), 2))
    assert [name for name, _ in found] == [key] and re.search(words, found[0][1]), found


def test_the_model_runs_at_its_own_layout_and_its_student_is_cut_for_another():
    values = small(teacher__parallel={"tp": 2}, student__model=None, student__checkpoint="s")
    alone = as_teacher(values)
    assert (values.parallel.tp, alone.parallel.tp, alone.students_per_teacher) == (1, 2, 1)
    check_sizes(values.model_copy(update={"prune": Prune(ffn_hidden_size=87)}), models.section("llama"))


def test_experts_in_groups_stay():
    moe = models.EXPERTS | {"num_groups": 2, "group_top_k": 1}
    (found,) = problems(models.section("mixtral", moe=moe), Prune(num_experts=4), 1)
    assert found == ("num_experts", "4, but experts are chosen from 2 groups of one size; expected null")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": {"model": {}}}, "both needed"),
        ({"teacher": None}, "both needed"),
        ({"parallel": {"cp": 2}}, "importances are of whole sequences"),
        ({"student": {"checkpoint": "HERE"}}, "exists; `megakd prune` writes it"),
    ],
)
def test_what_is_refused_before_ranks_meet(changes, words, tmp_path):
    values = json.loads(json.dumps(small(student__model=None, student__checkpoint="new").model_dump()))
    if "model" in changes.get("student", {}):
        changes = {"student": {"model": small().student.model.model_dump()}}
    if changes.get("student", {}).get("checkpoint") == "HERE":
        changes = {"student": {"checkpoint": str(tmp_path)}}
    with pytest.raises(ConfigError, match=words):
        check_config(Config.from_dict(values | changes))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_layers": 2, "drop_layers": [1]}, "expected one of them"),
        ({"keep_layers": [1, 1]}, "names a layer twice"),
        ({"num_layers": 0}, "expected integer >= 1"),
    ],
)
def test_a_section_that_contradicts_itself(asked, words):
    with pytest.raises(ConfigError, match=words):
        Config.from_dict(small().model_dump() | {"prune": asked})


def test_what_a_section_says_of_single_layers_goes_with_them():
    moe = models.EXPERTS | {"layers": [1, 3]}
    model = models.section("mixtral", moe=moe, no_rope_layers=[0, 3], sliding_window=8, sliding_window_layers=[1, 2])
    left = with_layers(model, [0, 2, 3])
    assert (left.num_layers, left.no_rope_layers, left.sliding_window_layers) == (3, [0, 2], [1])
    assert left.moe.layers == [2] and with_layers(model, [0, 2]).moe is None
    bare = with_layers(model, [0, 3])
    assert bare.sliding_window is None and bare.sliding_window_layers is None


def test_parameters_lie_between_bounds_while_unlike_layers_are_open():
    model = models.section("qwen2_moe")
    asked = Prune(num_layers=2, num_experts=5)
    narrow = narrowed(model, asked)
    few, many = bounds(narrow, None, 2)
    assert few < many and sorted(bounds(narrow, layers, 2) for layers in ([0, 2], [1, 3])) == [(few,) * 2, (many,) * 2]


@pytest.mark.parametrize("axis", [0, 1])
def test_ties_go_to_the_first(axis):
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [5.0, torch.nan, 0.0, 5.0]])[axis]
    assert most_important(scores, 2).tolist() == [[1, 2], [0, 3]][axis]
