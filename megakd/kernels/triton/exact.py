"""The K largest logits of a row by bisection of the row itself, in Triton.

It reads a row as often as it takes: some 20 times, up to 40 where the K-th largest is equal to others. So it is for
rows that candidates.py has left (many equal logits), and for shards too narrow for chunks, whose rows stay in the first
cache.

Sizes: T tokens, W columns, M candidates of a row at most; S, N, E in tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.slots import CROWDED, empty_slots, find_slots, ordered, store_rest
from megakd.kernels.triton.tiles import (
    IN_LOG2,
    LANES,
    LOG2_E,
    absorb,
    lane_max,
    lane_shape,
    lane_sum,
    load_tile,
    meet,
    no_columns,
    tile_columns,
)

SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # low bits that are the same in every such number
COLUMNS = 8  # of a lane, which holds them, their places and slots in registers at once


def pick_exactly(
    logits_TW: Tensor,
    columns_TM: Tensor,
    x_TM: Tensor,
    rest_4T: Tensor,
    top_k: int,
    width: int,
    temperature: float,
    *,
    at_one: bool,
    every_row: bool,
) -> None:
    """Writes candidates as `candidates.Candidates` has them, no more than min(K, width): in crowded rows, or in all."""
    tokens, shape = len(logits_TW), lane_shape(logits_TW)
    shape["S"] = max(1, COLUMNS // shape["E"])
    while shape["S"] > 1 and shape["S"] * shape["E"] * LANES.value >= 2 * width:
        shape["S"] //= 2
    if tokens:
        _exact[tokens,](
            logits_TW, columns_TM, x_TM, rest_4T, *logits_TW.stride(), width, tokens, min(top_k, width),
            LOG2_E / temperature, ALL=every_row, AT_ONE=at_one, SHIFT=SHIFTS[logits_TW.dtype], M=x_TM.shape[1], **shape,
        )  # fmt: skip


@triton.jit
def _exact(
    logits, columns, values, rest, row_stride, column_stride, width, tokens, wanted, scale, ALL: tl.constexpr,
    AT_ONE: tl.constexpr, SHIFT: tl.constexpr, M: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stop = width
    if not ALL:
        stop = tl.where(tl.load(rest + 3 * tokens + row) == CROWDED, width, -1)
    if stop >= 0:
        logits += row * row_stride
        low, high, broken = _limits(logits, stop, column_stride, SHIFT, S, E)
        above, reached = 0, tl.where(broken, wanted, stop)
        while (reached != wanted) & (high - low > 1):  # `wanted` reach low, or more do; fewer reach high
            middle = (low + high) >> 1
            count = _count(logits, middle.to(tl.int32), stop, column_stride, SHIFT, S, E)
            fits = count >= wanted
            low, high = tl.where(fits, middle, low), tl.where(fits, high, middle)
            above, reached = tl.where(fits, above, count), tl.where(fits, count, reached)
        missing = tl.where(reached == wanted, 0, wanted - above)  # of those equal to low
        least, level = tl.where(missing == 0, low, high).to(tl.int32), low.to(tl.int32)
        first, last = -1, tl.where(missing == 0, -1, stop - 1)  # up to `first` there are no more than are missing
        while last - first > 1:
            middle = (first + last) >> 1
            fits = _count_ties(logits, level, middle, stop, column_stride, SHIFT, S, E) <= missing
            first, last = tl.where(fits, middle, first), tl.where(fits, last, middle)
        columns += row * M
        values += row * M
        found = 0
        max_N, sum_N, at_one_N = no_columns()
        for start in range(0, tl.where(broken, 0, stop), S * LANES * E):
            x_SNE, order_SNE, column_SNE = _tile(logits, start, stop, column_stride, SHIFT, S, E)
            kept = (order_SNE >= least) | ((order_SNE == level) & (column_SNE <= first))
            kept &= column_SNE < stop
            slot, count = find_slots(kept)
            tl.store(columns + found + slot, column_SNE, mask=kept)
            tl.store(values + found + slot, x_SNE.to(values.dtype.element_ty), mask=kept)
            found += count
            left_SNE = tl.where(kept, -float("inf"), x_SNE)
            max_N, sum_N, at_one_N = absorb(left_SNE, max_N, sum_N, at_one_N, scale, AT_ONE)
        empty_slots(columns, values, found, broken, M)
        at_one = meet(max_N, at_one_N, IN_LOG2)
        store_rest(rest + row, tokens, tl.max(max_N, 0), meet(max_N, sum_N, scale), at_one, 0.0, AT_ONE)


@triton.jit
def _tile(logits, start, stop, column_stride, SHIFT: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
    """A tile's logits, their order, and their columns."""
    x_SNE = load_tile(logits, start, stop, column_stride, S, E)
    return x_SNE, ordered(x_SNE) >> SHIFT, start + tile_columns(S, E)


@triton.jit
def _limits(logits, stop, column_stride, SHIFT: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
    """The lowest order of a row, one more than its highest (int64), and whether anything in it is not finite."""
    low, high, zero = 0x7FFFFFFF, -0x7FFFFFFF, 0.0
    for start in range(0, stop, S * LANES * E):
        x_SNE, order_SNE, column_SNE = _tile(logits, start, stop, column_stride, SHIFT, S, E)
        here = column_SNE < stop
        zero += tl.sum(lane_sum(tl.where(here, x_SNE * 0.0, 0.0)), 0)
        low = tl.minimum(low, -tl.max(lane_max(tl.where(here, -order_SNE, -0x7FFFFFFF)), 0))
        high = tl.maximum(high, tl.max(lane_max(tl.where(here, order_SNE, -0x7FFFFFFF)), 0))
    return low.to(tl.int64), high.to(tl.int64) + 1, zero != 0.0


@triton.jit
def _count(logits, least, stop, column_stride, SHIFT: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
    """How many logits of a row are of this order or a higher one."""
    count_N = tl.zeros((LANES,), tl.int32)
    for start in range(0, stop, S * LANES * E):
        _, order_SNE, column_SNE = _tile(logits, start, stop, column_stride, SHIFT, S, E)
        count_N += lane_sum(((order_SNE >= least) & (column_SNE < stop)).to(tl.int32))
    return tl.sum(count_N, 0)


@triton.jit
def _count_ties(logits, level, last, stop, column_stride, SHIFT: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
    """How many logits up to a column are of this very order."""
    count_N = tl.zeros((LANES,), tl.int32)
    for start in range(0, tl.minimum(stop, last + 1), S * LANES * E):
        _, order_SNE, column_SNE = _tile(logits, start, stop, column_stride, SHIFT, S, E)
        count_N += lane_sum(((order_SNE == level) & (column_SNE <= last)).to(tl.int32))
    return tl.sum(count_N, 0)
