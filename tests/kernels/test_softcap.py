"""The soft cap on logits in PyTorch, here, and in Triton, in a process of its own (see test_triton.py)."""

import pathlib

from tests.kernels.softcap_cases import test_cap_and_its_derivative  # noqa: F401
from tests.kernels.test_triton import needs_triton, run


@needs_triton
def test_interpreted():
    cases = str(pathlib.Path(__file__).with_name("softcap_cases.py"))
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")
