"""Which implementation of the passes over rows reads a tensor of logits, and why; each choice is logged once."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

from torch import Tensor

LOGGER = logging.getLogger(__name__)


def row_passes(logits_TW: Tensor) -> ModuleType:
    """The module with `statistics`, `backward`, `summarize` and `extremes` for these logits.

    Triton on CUDA where it is installed, and anywhere under TRITON_INTERPRET=1 (slow: for tests); otherwise PyTorch.
    """
    return _choose(logits_TW, "rows")


def selection_passes(logits_TW: Tensor) -> ModuleType:
    """The module with `scan_rows` and `take_entries` for these logits; chosen likewise."""
    return _choose(logits_TW, "selection_rows")


def fused_terms(x: Tensor) -> ModuleType | None:
    """The module that does the small steps of `terms` and `records` in few launches, where Triton reads the logits."""
    module = _choose(x, "rows")
    return importlib.import_module("megakd.kernels.triton_terms") if module.__name__.endswith("triton_rows") else None


def _choose(logits_TW: Tensor, name: str) -> ModuleType:
    triton_name = {"rows": "triton_rows", "selection_rows": "triton_selection"}[name]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _load(triton_name, "TRITON_INTERPRET=1", logging.INFO)
    if not logits_TW.is_cuda:
        return _load(name, f"the logits are on {logits_TW.device.type}", logging.INFO)
    if importlib.util.find_spec("triton") is None:
        return _load(name, "triton is not installed; install it for several times the speed", logging.WARNING)
    return _load(triton_name, "the logits are on cuda", logging.INFO)


@functools.cache
def _load(name: str, reason: str, level: int) -> ModuleType:
    LOGGER.log(level, "loss kernels: megakd.kernels.%s, because %s", name, reason)
    return importlib.import_module(f"megakd.kernels.{name}")
