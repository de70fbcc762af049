"""The sequence of docs/from-nemo-aligner.md is run as it stands, on chunks in NeMo-Aligner's format, made small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs.test_cache_aligner import line
from tests.training import runs

ROOT = Path(__file__).parents[2]
SMALLER = {
    "run: {dir: runs/kd}": "run: {dir: runs/kd, device: cpu}",
    "parallel: {tp: 8}": "parallel: {tp: 1}",
    "sequence_length: 4096": "sequence_length: 32",
    "steps: 100, micro_batch_size: 1, global_batch_size: 128}": "steps: 12, global_batch_size: 8, precision: fp32}",
    "lr: 1.0e-5, min_lr: 9.0e-7": "lr: 1.0e-2, min_lr: 1.0e-3",
    "warmup_steps: 10": "warmup_steps: 2",
    "every_steps: 50, samples: 640": "every_steps: 6, samples: 5",
    "--nproc-per-node 8 -m megakd train": "--standalone --nproc-per-node 1 -m megakd train",
    "--nproc-per-node 8 -m megakd evaluate": "--standalone --nproc-per-node 1 -m megakd evaluate",
}


def commands() -> str:
    """The block of the document, smaller."""
    text = (ROOT / "docs" / "from-nemo-aligner.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for written, small in SMALLER.items():
        assert block.count(written) == 1, written
        block = block.replace(written, small)
    return block


@pytest.mark.slow
def test_distillation_from_recorded_logits(tmp_path):
    runs.prepare(tmp_path)
    student = runs.values(tmp_path, tmp_path / "checkpoints" / "student", train__steps=1, data__validation=None)
    assert run_ranks(1, runs.train, student) == [None]
    (tmp_path / "logits").mkdir()
    for part, chunks in (("train", 2), ("val", 1)):
        for chunk in range(chunks):
            records = [line(100 * chunk + 50 * (part == "val") + number, top_k=4) for number in range(12)]
            text = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / "logits" / f"{part}_{chunk}.jsonl").write_text(text)
    tools = tmp_path / "bin"  # `megakd` and `torchrun` of this Python
    tools.mkdir()
    for name, module in (("megakd", "megakd"), ("torchrun", "torch.distributed.run")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (tools / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands()],
        cwd=tmp_path, env=environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "36 samples" in done.stdout and "from 2 caches" in done.stdout
    steps, validations = runs.lines(tmp_path / "runs" / "kd"), runs.lines(tmp_path / "runs" / "kd", "validation")
    assert len(steps) == 12 and len(validations) == 2 and steps[-1]["kd"] < 0.9 * steps[0]["kd"]
    assert json.loads((tmp_path / "runs" / "kd" / "evaluations.jsonl").read_text())["kd"] > 0
    assert (tmp_path / "student.nemo").is_file()
