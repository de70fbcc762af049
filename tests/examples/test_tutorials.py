"""The Dolly and OpenAssistant tutorials from public files to a distilled student, small, on two ranks at TP 2."""

import importlib.util
import json
from pathlib import Path

import pytest

from megakd.config import Config
from tests.ranks import run_ranks
from tests.tools import public_data
from tests.training import runs

ROOT = Path(__file__).parents[2]
TUTORIALS = {"dolly": public_data.dolly, "openassistant_chat": public_data.trees}
FILES = {"dolly": "databricks-dolly-15k.jsonl", "openassistant_chat": "2023-04-12_oasst_all.trees.jsonl.gz"}
RECIPES = {"dolly": "prepare_dolly", "openassistant_chat": "prepare_openassistant"}
SMALL = "num_layers: 2, ffn_hidden_size: 96, num_attention_heads: 4, max_sequence_length: 192, init_std: 0.1"


def prepare(tutorial, folder):
    """train.jsonl, val.jsonl and a tokenizer, by the recipe and `megakd prepare`."""
    from megakd.runs.prepare import main

    source = TUTORIALS[tutorial](folder / FILES[tutorial], 90)
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "tools" / f"{RECIPES[tutorial]}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    assert recipe.main(["--input", str(source), "--output", str(folder), "--validation", "0.1"]) == 0
    main(["tokenizer", "--input", f"{folder}/train.jsonl", "--output", f"{folder}/t.model", "--vocab-size", "320"])


def run(tutorial, config, folder, run_dir, hidden_size, *more):
    """Losses of a run of the example's own YAML, with the model, the paths and the batch made small."""
    overrides = [
        f"run.dir={run_dir}", "run.device=cpu", "parallel.tp=2", "student.checkpoint=null",
        f"student.model={{{SMALL}, hidden_size: {hidden_size}}}", f"data.tokenizer={folder}/t.model",
        f"data.train={folder}/train.jsonl", f"data.validation={folder}/val.jsonl", "data.sequence_length=192",
        "train.epochs=null", "train.steps=20", "train.global_batch_size=8", "train.micro_batch_size=4",
        "train.precision=fp32", "optimizer.lr=1.0e-2", "eval.every_steps=null", "data.workers=1",
        "log.progress=false", *more,
    ]  # fmt: skip
    config = Config.load(ROOT / "examples" / tutorial / config, overrides)
    assert run_ranks(2, runs.train, config.model_dump()) == [None, None]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_fine_tuning_then_distillation(tutorial, tmp_path):
    prepare(tutorial, tmp_path)
    sft = run(tutorial, "sft.yaml", tmp_path, tmp_path / "sft", 64)
    assert sft[-1]["ce"] < 0.5 * sft[0]["ce"]
    more = [f"teacher.checkpoint={tmp_path}/sft", "data.packing=true", "train.global_batch_size=4"]
    kd = run(tutorial, "kd.yaml", tmp_path, tmp_path / "kd", 32, *more)
    assert kd[-1]["kd"] < 0.5 * kd[0]["kd"] and kd[-1]["ce"] < 0.6 * kd[0]["ce"]
    indexes = [path.name for path in (tmp_path / "train.jsonl.megakd").glob("*.bin")]
    assert len(indexes) == 1, "both runs read one index"
