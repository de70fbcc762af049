"""Rows that go to extremes, as in test_extremes.py, on one rank: every form as Triton compiles it, to 60 digits."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.kernels.dense import PAIRS
from tests.kernels.test_extremes import compare_top_k, rows
from tests.kernels.triton_cases.problems import DEVICE, INTERPRETED, REMARKS

pytestmark = REMARKS
FEW = settings(
    max_examples=5 if INTERPRETED else 200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("name, tail", PAIRS)
@FEW
@given(rows())
def test_top_k(name, tail, row):
    compare_top_k(row | {"ranks": 1}, name, tail, DEVICE)
