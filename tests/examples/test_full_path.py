"""The examples at real size, with tiny models: every command that their run.sh --tiny gives, one after the other."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megakd.cli import main
from megakd.config import Config
from tests import forked
from tests.training.runs import ENVIRONMENT

ROOT = Path(__file__).parents[2]
MEGAKD = [sys.executable, "-m", "megakd"]
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def commands(example: str, work: Path, *words: str) -> list[list[str]]:
    """What run.sh would do."""
    script = ROOT / "examples" / example / "run.sh"
    environment = os.environ | {"PYTHON": sys.executable, "WORK": str(work)}
    done = subprocess.run(
        [script, "--tiny", "--print", *words], env=environment, capture_output=True, text=True, check=True
    )
    return [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("+ ")]


def run(command: list[str]) -> str:
    """Does the same without the seven seconds that every process takes to import; returns what was printed."""
    if command[: len(RANKS)] == RANKS:
        number, dash, megakd, *arguments = command[len(RANKS) :]
        assert (dash, megakd) == ("-m", "megakd")
        ranks = forked.by_hand(int(number), "tests.quick_cli", *arguments, environment=ENVIRONMENT, together=True)
        try:
            outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0] * len(ranks), (command, outputs)
        return outputs[0]
    program, *arguments = ["tests.quick_cli", *command[3:]] if command[:3] == MEGAKD else command[1:]
    done = forked.run(program, *arguments, timeout=200, environment=ENVIRONMENT, together=True)
    assert done.returncode == 0, (command, done.stdout)
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)  # on a machine that does other things as well
@pytest.mark.parametrize(
    ("example", "words", "export"),
    [("llama3_70b_to_8b", [], "huggingface"), ("nemotron_8b_to_2b", ["--cached"], "student.nemo")],
)
def test_the_whole_path_with_tiny_models(example, words, export, tmp_path):
    said = {}
    for command in commands(example, tmp_path, *words):
        verb = command[command.index("megakd") + 1] if "megakd" in command else "make"
        said[verb] = run(command)
    assert ("cache" in said) == bool(words)
    assert "fits" in said["check"] and "launch:" in said["check"]
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"step": 4, "finished": True}
    assert (tmp_path / "run" / export).exists() and str(tmp_path / "student") in said["evaluate"]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["kind"] == "train"]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    if export == "huggingface":
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / export)


ENDS = {"vocab_size": 128256, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = ENDS | {"model_type": "llama", "max_position_embeddings": 131072, "num_key_value_heads": 8}
HALF = {"vocab_size": 256000, "max_position_embeddings": 4096, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
REAL = {  # what of the published config.json files makes sizes: teacher, student
    "llama3_70b_to_8b": (
        LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "nemotron_8b_to_2b": (
        ENDS | HALF | {"model_type": "nemotron", "hidden_size": 4096, "intermediate_size": 16384,
                       "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
        ENDS | HALF | {"model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5440,
                       "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("example", REAL)
def test_the_table_in_the_readme_is_what_check_prints(example, tmp_path, capsys):
    folder = ROOT / "examples" / example
    for name, config in zip(("teacher", "student"), REAL[example], strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    models = [f"{name}.checkpoint={tmp_path / name}" for name in ("teacher", "student")]
    assert main(["check", str(folder / "kd.yaml"), *models, "--gpus-per-node", "8", "--gpu", "h100"]) == 0
    printed = capsys.readouterr().out.partition("\nlayouts that fit")[0]
    shown = (folder / "README.md").read_text("utf-8").split("```")[1]
    assert printed.strip() == shown.strip()


@pytest.mark.parametrize("example", ["llama3_70b_to_8b", "nemotron_8b_to_2b"])
def test_real_size_has_the_tutorials_numbers(example):
    config = Config.load(ROOT / "examples" / example / "kd.yaml", [])
    loss, train = config.loss, config.train
    assert (loss.top_k, loss.kd_weight, loss.ce_weight, loss.divergence) == (100, 1.0, 0.4, "forward_kl")
    assert (train.global_batch_size, config.optimizer.lr, config.data.sequence_length) == (128, 1e-5, 4096)
    assert config.export.format in ("hf", "nemo")
