"""What a config accepts, and that every mistake is named with its key, the value seen and what was expected."""

import os
import re

import pytest

from megakd.config import Config, Loss, check_model, check_ranks, check_vocab
from megakd.config.config import LOGITS_BUDGET
from megakd.config.keys import iter_keys
from megakd.config.problems import ELSEWHERE
from megakd.errors import ConfigError
from tests.config.conftest import DROP

YAML = """
run: {dir: runs/x}
student:
  model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 4, max_sequence_length: 128}
data: {train: train, tokenizer: tok.model, sequence_length: 128}
train: {steps: 20, global_batch_size: 12}
optimizer: {lr: 3e-4}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def message(build, changes):
    with pytest.raises(ConfigError) as caught:
        build(changes)
    return str(caught.value)


def test_defaults(build):
    config = build()
    assert config.run.seed == 1234 and config.run.device == "auto" and config.run.allow_change == []
    assert (config.parallel.tp, config.parallel.pp, config.parallel.sp) == (1, 1, False)
    assert config.teacher is None and config.loss == Loss()
    assert config.optimizer.beta2 == 0.95 and config.schedule.kind == "cosine" and config.checkpoint.keep_last == 2


def test_is_frozen(build):
    with pytest.raises(ValueError, match="frozen"):
        build().train.steps = 3


def test_loads_yaml_with_overrides_on_top(file):
    config = Config.load(file, ["train.steps=7", "teacher.checkpoint=t", "student.model.tie_embeddings=false"])
    assert config.optimizer.lr == 3e-4
    assert config.train.steps == 7 and config.student.model.tie_embeddings is False
    assert config.teacher.checkpoint == "t" and config.teacher.allow_weak is False


def test_saved_config_is_complete_and_reads_back_equal(file, tmp_path):
    config = Config.load(file, ["run.dir=no", "log.wandb_project='3e-4'", "optimizer.eps=1e-12"])
    config.save(tmp_path / "resolved.yaml")
    assert Config.load(tmp_path / "resolved.yaml") == config
    assert "keep_best: true" in (tmp_path / "resolved.yaml").read_text()
    assert sorted(os.listdir(tmp_path)) == ["resolved.yaml", "run.yaml"]


def test_a_save_that_fails_leaves_the_old_file(file, tmp_path, monkeypatch):
    target = tmp_path / "resolved.yaml"
    target.write_text("old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"resolved.yaml: .* cannot be written: No space left"):
        Config.load(file).save(target)
    assert target.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["resolved.yaml", "run.yaml"]


def test_every_problem_is_listed_with_key_value_and_expectation(build):
    text = message(
        build,
        {
            "train.micro_batch_size": 0,
            "run.seed": True,
            "optimizer.lr": "fast",
            "train.steps": 20.0,
            "loss.tail": "ghost",
            "data.train": 3,
            "run.allow_change": ["train", 3],
            "optimizer.clip_grad": float("nan"),
            "data.sequence_length": DROP,
            "teacher": 3,
        },
    )
    for line in (
        "here.yaml: 10 problems",
        "train.micro_batch_size: 0, expected integer >= 1",
        "run.seed: true, expected integer >= 0 and < 2147483648",
        "optimizer.lr: 'fast', expected number > 0",
        "train.steps: 20.0, expected integer >= 1 or null",
        "loss.tail: 'ghost', expected bucket, renormalize, renormalize_teacher or drop",
        "data.train: 3, expected non-empty text",
        "run.allow_change[1]: 3, expected non-empty text",
        "optimizer.clip_grad: nan, expected number >= 0",
        "data.sequence_length: missing, expected integer >= 1",
        "teacher: 3, expected section or null",
        "hint: `megakd train --help`",
    ):
        assert re.search(rf"(^| ){re.escape(line)}", text, re.MULTILINE), line


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.micro_batchsize", "train.micro_batch_size"),
        ("train.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("optimiser", "optimizer"),
        ("student.model.hiddensize", "student.model.hidden_size"),
        ("data.model", "student.model"),
        ("learning_rate", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("train.batch_size", "train.global_batch_size"),
        ("parallel.tensor_model_parallel_size", "parallel.tp"),
    ],
)
def test_an_unknown_key_names_the_nearest(build, key, meant):
    assert message(build, {key: 1}).startswith(f"here.yaml: {key}: unknown key; did you mean {meant}?\n")


def test_a_number_that_the_divergence_does_not_have_is_refused(build):
    """`alpha` is elsewhere the weight of the divergence."""
    said = message(build, {"loss.alpha": 0.9, "loss.beta": 0.3})
    assert "loss.alpha: 0.9, but forward_kl has no such number; how much the divergence weighs is kd_weight" in said
    assert "loss.beta: 0.3, but forward_kl has no such number\n" in said
    build({"loss.divergence": "alpha", "loss.alpha": 0.9})


def test_words_of_other_projects_lead_to_keys_and_are_none():
    known = {key.name for key in iter_keys(Config)}
    assert set(ELSEWHERE.values()) <= known
    assert not ELSEWHERE.keys() & {name.rpartition(".")[2] for name in known}


def test_without_a_teacher_what_speaks_of_one_is_idle_and_named(build):
    changes = {"loss.top_k": 8, "loss.logits_memory_budget_bytes": 9, "loss.ramps.ce_weight": {"to": 0.0, "steps": 5}}
    features = {"features": {"student_layers": [1], "teacher_layers": [1]}}
    assert build(changes).idle_keys()[0] == "loss.top_k" and "features" not in build(changes).idle_keys()
    assert {"loss.top_k", "features"} <= set(build(changes | features).idle_keys())
    assert LOGITS_BUDGET == "loss.logits_memory_budget_bytes" not in build(changes).idle_keys()
    assert build({"teacher.checkpoint": "t", **changes}).idle_keys() == [] == build().idle_keys()


def test_an_unknown_key_far_from_all_is_still_named(build):
    assert message(build, {"qqqq": 1}).startswith("here.yaml: qqqq: unknown key\n")


def test_problems_of_overrides_say_so(file):
    with pytest.raises(ConfigError, match=r"train.steps: 0, expected integer >= 1 or null \(set on the command line\)"):
        Config.load(file, ["train.steps=0"])
    with pytest.raises(ConfigError, match=r"trian: unknown key; did you mean train\? \(set on the command line\)"):
        Config.load(file, ["trian.steps=20"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run: {dir: caf\xe9}", "not UTF-8 text: byte 0xe9 at offset 14"),
        (b"run:\n  dir: [x\n", "line 3, column 1: not valid YAML"),
        (
            b"run: {dir: x}\ntrain: {steps: 1}\nrun: {dir: y}\n",
            "line 3, column 1: not valid YAML: key 'run' is given twice",
        ),
        (b"- 3\n", "the document: [3], expected sections"),
        (b"just text\n", "the document: 'just text', expected sections"),
        (b"run: 1\n---\nrun: 2\n", "not valid YAML: but found another document"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, expected):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Config.load(tmp_path / "bad.yaml")
    assert expected in str(caught.value) and "bad.yaml" in str(caught.value) and "\nhint: " in str(caught.value)


def test_missing_file_and_missing_argument(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: the config file cannot be read: No such file"):
        Config.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="expected a config file after the verb, got nothing"):
        Config.from_arguments([])
    with pytest.raises(ConfigError, match=r"expected a config file after the verb, got `train.steps=3`"):
        Config.from_arguments(["train.steps=3"])


MODEL = "student.model."


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"student.checkpoint": "c"}, "student.checkpoint: both are given; expected exactly one"),
        ({"student.model": None}, "student.checkpoint: neither is given; expected exactly one"),
        ({"train.epochs": 1.0}, "train.steps: both are given; expected exactly one"),
        ({"train.steps": None}, "train.steps: neither is given; expected exactly one"),
        (
            {"checkpoint.every_steps": 4, "checkpoint.keep_every": 6},
            "checkpoint.keep_every: 6 is no multiple of every",
        ),
        ({"checkpoint.keep_every": 6}, "checkpoint.keep_every: 6 is no multiple of every_steps (null)"),
        ({MODEL + "num_query_groups": 3}, MODEL + "num_query_groups: 3 does not divide num_attention_heads = 4"),
        ({MODEL + "hidden_size": 66}, MODEL + "hidden_size: 66 is not divisible by num_attention_heads = 4"),
        ({MODEL + "kv_channels": 7}, MODEL + "rotary_percent: rotates 7 of 7 channels"),
        ({"parallel.tp": 8}, MODEL + "num_attention_heads: 4 is not divisible by parallel.tp = 8"),
        ({"parallel.tp": 4}, MODEL + "num_query_groups: 2 is not divisible by parallel.tp = 4"),
        ({"parallel.tp": 2, MODEL + "ffn_hidden_size": 97}, MODEL + "ffn_hidden_size: 97 is not divisible by parallel"),
        ({"parallel.pp": 3}, MODEL + "num_layers: 2 is not divisible by parallel.pp = 3"),
        ({"parallel.sp": True}, "parallel.sp: true, but parallel.tp is 1"),
        (
            {"parallel.tp": 2, "parallel.sp": True, "data.sequence_length": 127},
            "data.sequence_length: 127 is not divis",
        ),
        (
            {"data.sequence_length": 129},
            "data.sequence_length: 129 tokens exceed the model's max_sequence_length = 128",
        ),
        ({"data.tokenizer": None}, "data.tokenizer: null, and a student.model has no tokenizer"),
        ({"train.micro_batch_size": 5}, "train.global_batch_size: 12 is not divisible by micro_batch_size = 5"),
        (
            {"features": {"student_layers": [1], "teacher_layers": [1]}, "teacher.cache": "c"},
            "features: given with tea",
        ),
        ({"optimizer.min_lr": 0.002}, "optimizer.min_lr: 0.002 is above lr = 0.001"),
        ({"schedule.kind": "wsd"}, "schedule.wsd_decay_steps: missing; kind wsd needs it"),
        ({"schedule.wsd_decay_steps": 3}, "schedule.wsd_decay_steps: 3 has no effect with kind cosine"),
        ({"schedule.warmup_steps": 20}, "schedule.warmup_steps: 20 must be below train.steps = 20"),
        (
            {"schedule.warmup_steps": 25, "schedule.decay_steps": 30},
            "schedule.warmup_steps: 25 must be below train.steps",
        ),
        (
            {"schedule.warmup_steps": 9, "schedule.decay_steps": 9},
            "schedule.warmup_steps: 9 must be below schedule.decay_steps = 9",
        ),
        (
            {"schedule.kind": "wsd", "schedule.wsd_decay_steps": 16, "schedule.warmup_steps": 5},
            "schedule.wsd_decay_steps: 16 and schedule.warmup_steps = 5 exceed train.steps = 20",
        ),
        ({"log.wandb_tags": ["a"]}, "log.wandb_tags: ['a'] has no effect without wandb_project"),
        ({"eval.every_steps": 5}, "eval.every_steps: 5, but data.validation is null"),
        ({"run.allow_change": ["train.step"]}, "run.allow_change: 'train.step' is no key; did you mean train.steps?"),
    ],
)
def test_rules_between_fields(build, changes, problem):
    text = message(build, changes)
    assert f"here.yaml: {problem}" in text or f"\n  {problem}" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"checkpoint": "c"}, "data.tokenizer": None},
        {"train.steps": None, "train.epochs": 0.5},
        {MODEL + "hidden_size": 66, MODEL + "kv_channels": 16},
        {MODEL + "kv_channels": 7, MODEL + "position_embedding": "learned_absolute"},
        {"parallel.tp": 2, "parallel.sp": True, "parallel.pp": 2},
        {"teacher.checkpoint": "t", "loss.top_k": 8},
        {"loss.top_k": 8, "features": {"student_layers": [1], "teacher_layers": [1]}},
        {"log.wandb_project": "p", "log.wandb_entity": "e", "log.wandb_group": "g", "log.wandb_tags": ["a", "b"]},
        {"schedule.kind": "wsd", "schedule.wsd_decay_steps": 15, "schedule.warmup_steps": 5},
        {"schedule.warmup_steps": 99, "train.steps": None, "train.epochs": 2.0},
        {"eval.every_steps": 5, "data.validation": "v"},
        {"run.allow_change": ["train", "optimizer.lr", "student.model"]},
    ],
)
def test_what_the_rules_allow(build, changes):
    build(changes)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "drop"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_divergence_and_tail(build, divergence, tail):
    changes = {"teacher.checkpoint": "t", "loss.divergence": divergence, "loss.tail": tail}
    if divergence == "reverse_kl" and tail in ("renormalize_teacher", "drop"):
        assert f"here.yaml: loss.tail: {tail}" in message(build, changes)
    else:
        assert build(changes).loss.tail == tail


def test_a_loss_of_nothing_is_refused(build):
    changes = {"teacher.checkpoint": "t", "loss.kd_weight": 0.0}
    assert "loss.kd_weight: 0, and ce_weight is 0 too" in message(build, changes)
    assert build(changes | {"loss.ce_weight": 1}).loss.ce_weight == 1.0


def test_check_ranks(build):
    config = build({"parallel.tp": 2, "parallel.pp": 2, "train.micro_batch_size": 2})
    assert [check_ranks(config, ranks) for ranks in (4, 8, 12, 24)] == [1, 2, 3, 6]
    with pytest.raises(ConfigError, match=r"6 ranks do not make whole models: parallel.tp 2 x parallel.pp 2 = 4"):
        check_ranks(config, 6)
    with pytest.raises(ConfigError, match=r"global_batch_size 12 is not divisible by .*micro_batch_size 2 x dp 4 = 8"):
        check_ranks(config, 16)


def test_check_vocab_asks_only_for_a_teacher(build):
    check_vocab(build(), 10)
    config = build({"teacher.checkpoint": "t", "loss.top_k": 11})
    check_vocab(config, 11)
    with pytest.raises(ConfigError, match=r"loss.top_k 11 exceeds the vocabulary of 10 ids"):
        check_vocab(config, 10)


def test_check_model_of_a_checkpoint(build):
    model = build().student.model
    config = build({"student": {"checkpoint": "c"}, "parallel.tp": 4, "data.sequence_length": 256})
    with pytest.raises(ConfigError) as caught:
        check_model(config, model, "teacher runs/t")
    assert str(caught.value).splitlines()[:3] == [
        "teacher runs/t: 2 problems",
        "  num_query_groups: 2 is not divisible by parallel.tp = 4",
        "  data.sequence_length: 256 tokens exceed the model's max_sequence_length = 128",
    ]
    check_model(build(), model, "teacher runs/t")


def test_flat_has_every_key_and_null_sections(build):
    flat = build().flat()
    assert flat["teacher"] is None and flat["student.model.hidden_size"] == 64 and flat["optimizer.lr"] == 0.001
    assert build({"teacher.checkpoint": "t"}).flat()["teacher.checkpoint"] == "t"


def test_what_megatron_does_not_train_is_refused():
    from megakd.config import MLA, Model, MoE, Parallel
    from megakd.config.checks import model_problems

    base = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    moe = MoE(num_experts=4, top_k=2, ffn_hidden_size=32)
    model = Model(**base, max_sequence_length=64).model_copy(update={"moe": moe})
    for trained in (True, False):
        found = [name for name, _ in model_problems(model, Parallel(tp=2), 64, trained=trained)]
        assert found == (["parallel.sp"] if trained else [])
    ranks = {"kv_lora_rank": 15, "q_lora_rank": 7, "qk_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    model = Model(**base, max_sequence_length=64, mla=MLA(**ranks))
    for tp, wrong in ((1, []), (2, ["mla.kv_lora_rank", "mla.q_lora_rank"])):
        assert [name for name, _ in model_problems(model, Parallel(tp=tp), 64, trained=True)] == wrong


@pytest.mark.parametrize("key", ["run.dir", "student.checkpoint", "teacher.cache", "data.train", "data.validation"])
def test_paths_are_of_this_file_system_with_the_home_folder_written_out(build, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/somebody")
    section, name = key.split(".")
    extra = {"student.model": DROP} if section == "student" else {}

    def built(value):
        config = build({key: value, **extra})
        return getattr(getattr(config, section), name)

    assert built("~/a") == "/home/somebody/a" and built("a/~b") == "a/~b"
    with pytest.raises(ConfigError, match=rf"{key}: s3://bucket/a is an address; expected a path in the file system"):
        built("s3://bucket/a")
    if section == "data":
        assert built([0.5, "~/a", 0.5, "~/b"]) == [0.5, "/home/somebody/a", 0.5, "/home/somebody/b"]
        with pytest.raises(ConfigError, match=rf"{key}: gs://a is an address"):
            built(["~/a", "gs://a"])
