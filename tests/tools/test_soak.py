"""A short soak under real torchrun: a run that is ended in the middle is the run that nobody ended."""

import pathlib
import sys
import time

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools"))

from soak import Soak, soak_kind


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ends_lose_nothing_and_leave_nothing(tmp_path):
    soak = Soak(tmp_path, steps=20)
    soak.prepare()
    for kind, asynchronous in (("term", True), ("kill-rank", False)):
        result = soak_kind(soak, kind, asynchronous, ends=1, until=time.monotonic() + 400)
        assert result == {"kind": kind, "asynchronous": asynchronous, "ends": 1, "hangs": 0, "runs": 1, "problems": []}
