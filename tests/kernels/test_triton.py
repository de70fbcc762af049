"""Runs triton_cases.py in a process of its own: through Triton's interpreter, and compiled where there is a GPU.

Whether Triton interprets is settled when it is first imported, and other tests (or torch itself) may have done that.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

CASES = pathlib.Path(__file__).with_name("triton_cases.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_cases(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        command, env={**kept, **environment}, cwd=CASES.parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
def test_interpreted():
    run_cases(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_compiled():
    run_cases(CUBLAS_WORKSPACE_CONFIG=":4096:8")
