"""A short soak under real torchrun: a run that is ended in the middle is the run that nobody ended."""

import pathlib
import sys
import time

import pytest

from tests.ranks import run_ranks
from tests.training import runs

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools"))

from soak import Soak, soak_kind


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ends_lose_nothing_and_leave_nothing(tmp_path):
    """A rank is killed, and the run goes on; of signals see tests/training/test_runs.py."""
    soak = Soak(tmp_path, steps=20)
    soak.prepare_data()
    assert run_ranks(2, runs.train, soak.config(tmp_path / "reference", asynchronous=False)) == [None, None]
    result = soak_kind(soak, "kill-rank", asynchronous=False, ends=1, until=time.monotonic() + 400)
    counts = {"ends": 1, "hangs": 0, "runs": 1}
    assert result == {"kind": "kill-rank", "asynchronous": False, **counts, "problems": []}
