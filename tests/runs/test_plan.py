"""`megakd check CONFIG.yaml`: what a run needs, from the config and the models' descriptions alone."""

import json
import pathlib

import pytest
import yaml

from megakd.cli import main
from megakd.config import Config, Model
from megakd.planning.flops import forward_flops
from megakd.planning.parameters import rank_parameters
from megakd.planning.traffic import step_traffic

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "rope_theta": 500000.0, "hidden_act": "silu",
    "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LITTLE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.fixture
def config(tmp_path):
    """70 billion parameters beside 8: folders with a config.json and nothing else."""
    for name, sizes in (("teacher", LARGE), ("student", LITTLE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | sizes))
    values = {
        "run": {"dir": "runs/kd"},
        "parallel": {"tp": 8, "sp": True},
        "student": {"checkpoint": str(tmp_path / "student")},
        "teacher": {"checkpoint": str(tmp_path / "teacher")},
        "data": {"train": "data/train", "sequence_length": 4096},
        "train": {"steps": 100, "global_batch_size": 128},
        "optimizer": {"lr": 1e-5},
    }
    file = tmp_path / "kd.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def plan(capsys, *words):
    code = main(["check", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_that_fits(config, capsys):
    code, said = plan(capsys, config, "--nodes", "2")
    assert code == 0 and said["fits"] and not said["problems"]
    assert (said["student_parameters"], said["teacher_parameters"]) == (8_030_261_248, 70_553_706_496)
    memory = said["memory_bytes"]
    student, teacher = said["student_parameters"] / 8, said["teacher_parameters"] / 8
    for name, bytes_ in {"weights": 2 * student, "gradients": 4 * student, "optimizer": 6 * student}.items():
        assert memory[name] == pytest.approx(bytes_, rel=0.01), name
    assert memory["teacher"] == pytest.approx(2 * teacher, rel=0.01) and memory["total"] < 72e9
    assert said["checkpoint_bytes"] == pytest.approx(14 * said["student_parameters"], rel=0.01)
    first = said["layouts"][0]
    assert {"parallel.tp=4", "parallel.pp=1", "parallel.sp=true", "train.recompute=none"} <= set(first["overrides"])
    assert main(["check", config, "--nodes", "2"]) == 0
    text = capsys.readouterr().out
    assert "8.03 B parameters, 32 layers of 4,096" in text and "70.6 B parameters" in text
    assert f"CONFIG={config} RUN_DIR=runs/kd sbatch --nodes=2 --gpus-per-node=8 train.sbatch" in text
    assert "torchrun --nnodes 2 --nproc-per-node 8" in text


def test_several_teachers_are_all_counted_or_with_offload_the_largest(config, capsys):
    values = yaml.safe_load(pathlib.Path(config).read_text(encoding="utf-8"))
    large, little = values.pop("teacher")["checkpoint"], values["student"]["checkpoint"]
    values["teachers"] = [
        {"name": "prose", "checkpoint": little, "data": ["data/train"]},
        {"name": "code", "checkpoint": large, "data": ["data/code"]},
    ]
    values["data"]["train"] = ["data/train", "data/code"]
    pathlib.Path(config).write_text(yaml.safe_dump(values), encoding="utf-8")
    _, said = plan(capsys, config, "--nodes", "2")
    both = 8_030_261_248 + 70_553_706_496
    assert said["teacher_parameters"] == both
    assert said["memory_bytes"]["teacher"] == pytest.approx(2 * both / 8, rel=0.01)
    _, said = plan(capsys, config, "teacher.offload=true", "--nodes", "2")
    assert said["memory_bytes"]["teacher"] == pytest.approx(2 * 70_553_706_496 / 8, rel=0.01)
    assert main(["check", config, "--nodes", "2"]) == 0
    text = capsys.readouterr().out
    assert "8.03 B parameters, 32 layers of 4,096, prose (weight 1)" in text and "weights of all" in text


def test_a_run_that_does_not_fit_is_given_a_layout_that_does(config, capsys):
    tight = ("train.micro_batch_size=8", "--nodes", "2", "--gpu-memory", "60GB")
    code, said = plan(capsys, config, "parallel.tp=4", *tight)
    assert code == 1 and not said["fits"] and said["layouts"]
    assert main(["check", config, "parallel.tp=4", *tight]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT: 54.00 GB are planned with" in text
    command = next(line for line in text.splitlines() if line.startswith("  torchrun"))
    overrides = [word for word in command.split() if "=" in word]
    assert overrides[:2] == ["parallel.tp=4", "train.micro_batch_size=8"]  # its own words, and what changes them
    assert plan(capsys, config, *overrides, *tight[1:])[0] == 0
    code, said = plan(
        capsys, config, "--gpu-memory", "20GiB", "--gpus-per-node", "1", "parallel.tp=1", "parallel.sp=false"
    )
    assert code == 1 and said["layouts"] == []


def test_what_cannot_be_is_named_before_any_memory_is(config, capsys):
    code, said = plan(capsys, config, "parallel.tp=3", "parallel.sp=false", "--gpus-per-node", "3")
    assert code == 1 and "memory_bytes" not in said
    assert any("teacher: num_query_groups: 8 is not divisible by parallel.tp = 3" in text for text in said["problems"])
    code, said = plan(capsys, config, "--gpus-per-node", "12")
    assert any("12 ranks do not make whole models" in text for text in said["problems"])


def test_a_recorded_teacher_takes_no_memory(config, capsys):
    words = (config, "teacher.cache=somewhere")
    code, said = plan(capsys, *words)
    assert code == 0 and said["teacher_parameters"] is None and said["memory_bytes"]["teacher"] == 0
    assert said["memory_bytes"]["lessons"] > 0


@pytest.mark.parametrize("flags", [["--gpu-memory", "80 bushels"], ["--nodes", "0"], ["--mfu", "2"]])
def test_flags_that_mean_nothing(flags, config, capsys):
    try:
        assert main(["check", config, *flags]) == 1
    except SystemExit as end:
        assert end.code == 2
    assert "expected" in capsys.readouterr().err


def model(**changes):
    sizes = {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 8}
    return Model(**sizes | {"max_sequence_length": 512, "vocab_size": 2048} | changes)


def test_arithmetic_is_that_of_the_products():
    dense = model(tie_embeddings=False)
    products = 8 * (4 * 256 * 256 + 3 * 256 * 1024) + 2048 * 256
    norms = 17 * 256
    assert forward_flops(dense, 512) == 2 * (products + norms) + 8 * 2 * 256 * 512
    windowed = model(tie_embeddings=False, sliding_window=64)
    assert forward_flops(dense, 512) - forward_flops(windowed, 512) == 8 * 4 * 256 * (256 - 64)


def traffic(ranks, student, **parallel):
    values = {
        "run": {"dir": "unused"}, "student": {"checkpoint": "unused"},
        "data": {"train": "unused", "sequence_length": 512},
        "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 2}, "optimizer": {"lr": 1.0},
        "parallel": parallel,
    }  # fmt: skip
    config = Config.from_dict(values)
    axes = config.parallel
    dp = ranks // (axes.tp * axes.pp * axes.cp)
    last = axes.pp - 1
    mine = rank_parameters(student, axes, 2048, last, config.student.pipeline)
    return step_traffic(config, student, None, mine, dp, last), mine.total


def test_bytes_on_each_axis():
    """By hand: a stream of 2 x 512 tokens, 256 wide, in bf16 is 524,288 bytes; there are 4 micro-batches over dp 1."""
    stream = 2 * 512 * 256 * 2
    sent, _ = traffic(4, model(), tp=4)
    assert sent == {"tp": 8 * 4 * 2 * 3 * stream // 4 * 4 + 3 * 1024 * 40 * 4}
    assert traffic(2, model(), pp=2)[0] == {"pp": stream * 4}
    sent, parameters = traffic(2, model())
    assert sent == {"dp": parameters * (4 + 2) // 2}
    sent, _ = traffic(2, model(), cp=2)
    assert sent["cp"] == 8 * 2 * 2 * 512 * 256 * 2 * 4
