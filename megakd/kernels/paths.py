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
    """The module with `statistics`, `backward`, `summarize` and `extremes` for these logits."""
    return choose(logits_TW, "megakd.kernels.rows", "megakd.kernels.triton.rows")


def softcap_passes(logits_TW: Tensor) -> ModuleType:
    """The module with `cap` and `uncap` for these logits."""
    return choose(logits_TW, "megakd.kernels.softcap", "megakd.kernels.triton.softcap")


def fused(x: Tensor, triton: str) -> ModuleType | None:
    """The named module, which does small steps in few launches, where Triton reads the logits; elsewhere None."""
    reads = row_passes(x).__name__ == "megakd.kernels.triton.rows"
    return importlib.import_module(triton) if reads else None


def choose(logits_TW: Tensor, plain: str, triton: str) -> ModuleType:
    """One of two modules with the same functions.

    Triton on CUDA where it is installed, and anywhere under TRITON_INTERPRET=1 (slow: for tests); otherwise PyTorch.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _load(triton, "TRITON_INTERPRET=1", logging.INFO)
    if not logits_TW.is_cuda:
        return _load(plain, f"the logits are on {logits_TW.device.type}", logging.INFO)
    if importlib.util.find_spec("triton") is None:
        return _load(plain, "triton is not installed; install it for several times the speed", logging.WARNING)
    return _load(triton, "the logits are on cuda", logging.INFO)


@functools.cache
def _load(name: str, reason: str, level: int) -> ModuleType:
    LOGGER.log(level, "loss kernels: %s, because %s", name, reason)
    return importlib.import_module(name)
