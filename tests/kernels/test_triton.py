"""Runs triton_cases/ in a process of its own: through Triton's interpreter, and compiled where there is a GPU.

That all kernels compile is shown without one, by triton_compile.py.

Whether Triton interprets is settled when it is first imported, and other tests (or torch itself) may have done that.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
CASES = (
    ("rows",),
    ("losses", "launches"),
    ("dense", "selection", "extremes"),
)  # a process each: it costs seconds to start
LIMIT_SECONDS = 1150  # the interpreter is slow, and a busy machine slower
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@contextlib.contextmanager
def side_by_side(request, jobs):
    """Futures of the jobs whose tests were chosen, two at a time: each of them is one thread's work.

    Args:
        jobs: functions, by the names of the tests that wait for them.
    """
    chosen = {item.name for item in request.session.items}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(job) for name, job in jobs.items() if name in chosen}
        pool.shutdown(cancel_futures=True)


def run(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def run_cases(names, **environment):
    files = [str(HERE / "triton_cases" / f"{name}.py") for name in names]
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, **environment)


@pytest.fixture(scope="module")
def started(request, tmp_path_factory):
    jobs = {
        f"test_interpreted[{' '.join(names)}]": functools.partial(run_cases, names, TRITON_INTERPRET="1")
        for names in CASES
    }
    cache = str(tmp_path_factory.mktemp("compiled"))
    jobs["test_every_kernel_compiles_for_gpus_that_are_not_there"] = functools.partial(
        run, str(HERE / "triton_compile.py"), "90", "80", TRITON_CACHE_DIR=cache, PYTHONPATH=str(ROOT)
    )
    with side_by_side(request, jobs) as futures:
        yield futures


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cases", CASES, ids=" ".join)
def test_interpreted(cases, started, request):
    started[request.node.name].result()


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_gpus_that_are_not_there(started, request):
    started[request.node.name].result()


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("cases", CASES, ids=" ".join)
def test_compiled(cases):
    run_cases(cases, CUBLAS_WORKSPACE_CONFIG=":4096:8", CUDA_LAUNCH_BLOCKING="1")  # errors are named, not the end
