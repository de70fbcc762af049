"""Runs triton_cases/ in a process of its own: through Triton's interpreter, and compiled where there is a GPU.

That all kernels compile is shown without one, by triton_compile.py.

Whether Triton interprets is settled when it is first imported, and other tests (or torch itself) may have done that.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
CASES = ("rows", "selection", "losses", "dense", "extremes")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def run_cases(name, **environment):
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_cases" / f"{name}.py"), **environment)


@needs_triton
@pytest.mark.timeout(1200)  # the interpreter is slow, and a busy machine slower
@pytest.mark.parametrize("cases", CASES)
def test_interpreted(cases):
    run_cases(cases, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(capability, tmp_path):
    run(
        str(HERE / "triton_compile.py"),
        capability,
        TRITON_CACHE_DIR=str(tmp_path),
        PYTHONPATH=str(ROOT),
    )


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("cases", CASES)
def test_compiled(cases):
    run_cases(cases, CUBLAS_WORKSPACE_CONFIG=":4096:8")
