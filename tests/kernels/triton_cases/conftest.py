"""Outputs are poisoned: torch.empty is full of NaN here."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import quick_interpreter

    quick_interpreter.install()


@pytest.fixture(autouse=True)
def poisoned():
    from tests.kernels.triton_cases.problems import DEVICE  # triton, which a collection of all tests must not import

    torch.use_deterministic_algorithms(True, warn_only=True)  # the poison is what is wanted of it
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
