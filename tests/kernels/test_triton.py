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
CASES = (("rows",), ("losses",), ("dense", "selection", "extremes"))  # a process each: it costs seconds to start
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def run_cases(names, **environment):
    files = [str(HERE / "triton_cases" / f"{name}.py") for name in names]
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, **environment)


@needs_triton
@pytest.mark.timeout(1200)  # the interpreter is slow, and a busy machine slower
@pytest.mark.parametrize("cases", CASES, ids=" ".join)
def test_interpreted(cases):
    run_cases(cases, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_gpus_that_are_not_there(tmp_path):
    run(str(HERE / "triton_compile.py"), "90", "80", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("cases", CASES, ids=" ".join)
def test_compiled(cases):
    run_cases(cases, CUBLAS_WORKSPACE_CONFIG=":4096:8")
