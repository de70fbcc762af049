"""Every other script of examples/slurm under a real Slurm: pipeline.sh from two Hugging Face folders to a third, over
two nodes and an array, and an array that generates."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from tests.data.hf_tokenizers import byte_level
from tests.slurm.conftest import ENDED, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
EXAMPLES = ROOT / "examples" / "slurm"
TINY = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
SECONDS = 900  # of a chain of jobs, on a machine that does other things as well


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """teacher and student as transformers saves them, data, a config, and what a user exports."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    for name in ("teacher", "student"):
        (folder / name).mkdir()
        byte_level(folder / name)
        LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).save_pretrained(folder / name)
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 40]
    for name, part in (("train", lines[:60]), ("validation", lines[60:80])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    config = {
        "run": {"dir": "given by the job", "device": "cpu"},
        "student": {"checkpoint": "given by the job"},
        "teacher": {"checkpoint": "given by the job", "allow_weak": True},
        "loss": {"top_k": 20},
        "data": {"train": f"{folder}/train.jsonl", "validation": f"{folder}/validation.jsonl", "sequence_length": 32,
                 "workers": 1},
        "train": {"steps": 4, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 1e-2},
        "eval": {"samples": 4},
        "log": {"progress": False},
    }  # fmt: skip
    (folder / "kd.yaml").write_text(yaml.safe_dump(config))
    return folder


def variables(**more):
    return {
        "HERE": str(EXAMPLES), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "RANKS_PER_NODE": "1", "SAVE_SECONDS": "60", "SBATCH_GPUS_PER_NODE": "1", **more,
    }  # fmt: skip


def logs(folder):
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log")))


def jobs_of(cluster, number):
    """Every job of an array, or the one."""
    rows = cluster.run("scontrol", "show", "job", "-o", number).splitlines()
    return [dict(word.partition("=")[::2] for word in row.split() if "=" in word) for row in rows]


def wait_for_all(cluster, number, folder):
    """The jobs, once all of them have ended; well. What was requeued does not wait for its minutes to pass."""
    deadline = time.monotonic() + SECONDS
    while any(job["JobState"] not in ENDED for job in jobs_of(cluster, number)):
        assert time.monotonic() < deadline, logs(folder)
        for job in jobs_of(cluster, number):
            if job["JobState"] == "PENDING" and job["Restarts"] != "0":
                with contextlib.suppress(RuntimeError):  # it has begun meanwhile
                    cluster.run("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now")
        time.sleep(0.5)
    jobs = jobs_of(cluster, number)
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}, (number, logs(folder))
    return jobs


def test_from_two_hugging_face_folders_to_a_third(cluster, made, tmp_path):
    work = tmp_path / "work"
    environment = variables(
        TEACHER=str(made / "teacher"), STUDENT=str(made / "student"), CONFIG=str(made / "kd.yaml"), WORK=str(work),
        PARTS="2", NODES="2",
    )  # fmt: skip
    said = cluster.run(str(EXAMPLES / "pipeline.sh"), **environment)
    numbers = dict(line.split() for line in said.splitlines())
    assert list(numbers) == ["teacher", "student", "cache", "merge", "train", "evaluate", "export"]
    jobs = {name: wait_for_all(cluster, number, work / "logs") for name, number in numbers.items()}
    assert {name for name, found in jobs.items() if len(found) == 2} == {"cache"}
    started = {name: min(job["StartTime"] for job in found) for name, found in jobs.items()}
    ended = {name: max(job["EndTime"] for job in found) for name, found in jobs.items()}
    for before, after in (("student", "cache"), ("cache", "merge"), ("merge", "train"), ("train", "export")):
        assert ended[before] <= started[after], (before, after, logs(work / "logs"))
    assert json.loads((work / "run" / "stopped.json").read_text()) == {"step": 4, "finished": True}
    steps = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "train" for line in steps) == 4 and "kd" in steps[1]
    (evaluated,) = (work / "run" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(evaluated)["kd"] > 0
    from transformers import AutoModelForCausalLM

    taught = AutoModelForCausalLM.from_pretrained(work / "distilled").state_dict()
    untaught = AutoModelForCausalLM.from_pretrained(made / "student").state_dict()
    assert taught.keys() == untaught.keys() and any((taught[name] != untaught[name]).any() for name in taught)


def test_an_array_generates_and_what_was_asked_to_stop_goes_on(cluster, made, tmp_path):
    """Two shares; the jobs are told that their time is over when they have begun, requeue, and finish."""
    prompts = [{"prompt": f"The quick brown fox {number}"} for number in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    environment = variables(
        CHECKPOINT=str(made / "teacher"), INPUT=str(tmp_path / "prompts.jsonl"), OUTPUT=str(tmp_path / "said.jsonl")
    )
    number = cluster.submit(
        "--array=0-1", f"--output={tmp_path}/%A_%a.log", str(EXAMPLES / "generate.sbatch"), "--device", "cpu",
        "--max-new-tokens", "24", "--batch-size", "1", "--ignore-eos", **environment,
    )  # fmt: skip
    cluster.wait(
        number, lambda job: "generating" in logs(tmp_path) or (tmp_path / "said.part0.jsonl").exists(), SECONDS
    )
    if not (tmp_path / "said.part0.jsonl").exists():
        cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_0")
    wait_for_all(cluster, number, tmp_path)
    lines = [json.loads(line) for part in (0, 1)
             for line in (tmp_path / f"said.part{part}.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(lines) == 60 and all(len(line["completion_ids"]) == 24 for line in lines)


def test_job_scripts_are_all_named_here_or_in_test_jobs():
    tried = {"train.sbatch", "cache.sbatch", "merge.sbatch", "convert.sbatch", "evaluate.sbatch", "generate.sbatch"}
    assert {path.name for path in EXAMPLES.glob("*.sbatch")} == tried
    assert os.access(EXAMPLES / "pipeline.sh", os.X_OK)
    assert subprocess.run(["bash", "-n", EXAMPLES / "pipeline.sh"]).returncode == 0
