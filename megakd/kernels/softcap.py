"""The soft cap on logits, cap(x) = c * tanh(x / c), and its derivative, in plain PyTorch.

The Triton twin has the same functions. Float32 arithmetic, a few rows at a time; one rounding to the result's dtype.

Sizes: T tokens, W vocabulary columns on this rank.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megakd.kernels.rows import block_bytes


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError unless the cap is None or a positive number."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number, not {softcap}")


def cap(raw_TW: Tensor, softcap: float, out_TW: Tensor) -> None:
    """out = softcap * tanh(raw / softcap); `out_TW` is written, and may be `raw_TW` itself."""
    for rows, x in float32_rows(raw_TW):
        out_TW[rows] = x.div_(softcap).tanh_().mul_(softcap)


def uncap(raw_TW: Tensor, softcap: float, grad_TW: Tensor) -> None:
    """grad *= dcap/draw, which turns a gradient of capped logits into that of the raw ones; `grad_TW` is overwritten.

    The derivative is 1 - tanh(u)^2 = 4 t / (1 + t)^2 with t = exp(-2 |u|), u = raw / softcap: no difference of numbers
    that are nearly equal, and not made from capped logits, whose rounding to 16 bits would be most of it.
    """
    for rows, x in float32_rows(raw_TW):
        t = x.abs_().mul_(-2 / softcap).exp_()
        grad_TW[rows] = (grad_TW[rows] * t).mul_(4).div_(t.add_(1)).div_(t)


def float32_rows(x_TW: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, a float32 copy of them that may be overwritten), a few rows at a time."""
    rows_per_block = max(1, block_bytes(x_TW) // (8 * max(1, x_TW.shape[1])))  # the copy, and what is made of it
    for first in range(0, len(x_TW), rows_per_block):
        rows = slice(first, first + rows_per_block)
        yield rows, x_TW[rows].to(torch.float32, copy=True)
