"""The soft cap of `megakd.kernels.softcap` in Triton: the same functions and signatures, one read and one write each.

A program takes TILE columns of a row; a result is rounded once, when it is stored.
"""

import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.tiles import on_its_device

TILE = 4096
WARPS = 8
FLAT = tl.constexpr(0.1)  # below it tanh is its series: 1 - exp would lose the digits that x has


@on_its_device
def cap(raw_TW: Tensor, softcap: float, out_TW: Tensor) -> None:
    """See `softcap.cap`."""
    if raw_TW.numel():
        _cap[_grid(raw_TW)](
            raw_TW, out_TW, *raw_TW.stride(), *out_TW.stride(), raw_TW.shape[1], softcap, 1 / softcap, TILE=TILE,
            num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _cap(
    raw, out, raw_row, raw_column, out_row, out_column, width, softcap, inverse, TILE: tl.constexpr
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    u = tl.load(raw + row * raw_row + columns.to(tl.int64) * raw_column, mask=columns < width, other=0.0)
    u = u.to(tl.float32) * inverse
    t = tl.exp(-2 * tl.abs(u))
    steep = tl.where(u < 0, t - 1, 1 - t) / (1 + t)
    square = u * u
    flat = u * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    capped = softcap * tl.where(tl.abs(u) < FLAT, flat, steep)
    tl.store(
        out + row * out_row + columns.to(tl.int64) * out_column, capped.to(out.dtype.element_ty), mask=columns < width
    )


@on_its_device
def uncap(raw_TW: Tensor, softcap: float, grad_TW: Tensor) -> None:
    """See `softcap.uncap`."""
    if raw_TW.numel():
        _uncap[_grid(raw_TW)](
            raw_TW, grad_TW, *raw_TW.stride(), *grad_TW.stride(), raw_TW.shape[1], -2 / softcap, TILE=TILE,
            num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _uncap(raw, grad, raw_row, raw_column, grad_row, grad_column, width, scale, TILE: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(raw + row * raw_row + columns.to(tl.int64) * raw_column, mask=columns < width, other=0.0)
    grad += row * grad_row + columns.to(tl.int64) * grad_column
    g = tl.load(grad, mask=columns < width, other=0.0).to(tl.float32)
    t = tl.exp(scale * tl.abs(x.to(tl.float32)))
    tl.store(grad, (4 * g * t / ((1 + t) * (1 + t))).to(grad.dtype.element_ty), mask=columns < width)


def _grid(x_TW: Tensor) -> tuple[int, int]:
    return len(x_TW), triton.cdiv(x_TW.shape[1], TILE)
