"""Which of a rank's logits may be among the K largest of all, and the sum of the others, in Triton.

1. `_chunks` reads the logits. A chunk is what a lane holds of a tile; its maximum and sum of exponentials are kept.
2. `_list` finds by bisection a bound that at least K chunk maxima reach, and few more. Then K logits reach it, and a
   column below it is not among the K largest. It lists the chunks whose maxima reach it, and sums up the others.
3. `_look_up` reads the listed chunks. The columns that reach the bound, about K, are the candidates; the others are
   added to the sum, each once: nothing is ever subtracted from a total.
4. exact.py picks the K largest of rows whose candidates did not fit, and of all rows in a shard too narrow for chunks.

Sizes: T tokens, K entries, W columns, C chunks, Q chunks listed and M candidates of a row at most, G chunks looked
up together; S, N, E in tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.exact import pick_exactly
from megakd.kernels.triton.slots import CROWDED, empty_slots, find_slots, ordered, store_rest
from megakd.kernels.triton.tiles import (
    IN_LOG2,
    LANES,
    LOG2_E,
    Grid,
    finite,
    lane_max,
    lane_shape,
    lane_sum,
    load_tile,
    place,
    tile_columns,
)

SCRATCH_BYTES = 32 << 20  # for the chunks of as many rows as are passed over together: they stay in the L2 cache
SMALLEST_CHUNK = 8  # columns


class Candidates(NamedTuple):
    """What is known of this rank's rows before the ranks have spoken.

    columns_TM, x_TM: the candidates, in no order; int32, -1 for none; in the logits' dtype, -inf for none, NaN in all
        of a row that is not finite.
    rest_4T: largest of all other logits, -inf for none; their sum of exp((x - max) / temperature); that at temperature
        1, where it was asked for; and the row's state; float32.
    """

    columns_TM: Tensor
    x_TM: Tensor
    rest_4T: Tensor


def find_candidates(logits_TW: Tensor, top_k: int, width: int, temperature: float, *, at_one: bool) -> Candidates:
    """Of the first `width` columns. At least min(K, width) of them, the K largest among them."""
    tokens, most = len(logits_TW), triton.next_power_of_2(max(16, top_k))
    columns_TM = logits_TW.new_empty((tokens, 2 * most), dtype=torch.int32)
    rest_4T = logits_TW.new_empty((4, tokens), dtype=torch.float32)
    found = Candidates(columns_TM, logits_TW.new_empty(columns_TM.shape), rest_4T)
    shape = lane_shape(logits_TW)
    while width < 2 * top_k * shape["S"] * shape["E"] and shape["S"] * shape["E"] > SMALLEST_CHUNK:
        shape["S"] //= 2
    chunked = width >= 2 * top_k * shape["S"] * shape["E"]
    if chunked and tokens:
        _by_chunks(logits_TW, found, top_k, width, temperature, at_one, shape)
    pick_exactly(logits_TW, *found, top_k, width, temperature, at_one=at_one, every_row=not chunked)
    return found


def _by_chunks(logits_TW, found: Candidates, top_k, width, temperature, at_one, shape) -> None:
    """Fills in the candidates of all rows but those that are crowded."""
    tokens, most, scale = len(logits_TW), found.x_TM.shape[1], LOG2_E / temperature
    chunks = triton.cdiv(width, shape["S"] * shape["E"] * LANES.value) * LANES.value
    power = max(512, triton.next_power_of_2(chunks))
    list_lanes = min(512, power // 16)
    block = min(tokens, max(1, SCRATCH_BYTES // (4 * (2 + at_one) * chunks)))
    scratch_3BC = found.rest_4T.new_empty((2 + at_one, block, chunks))
    told_5B, listed_BQ = scratch_3BC.new_empty((5, block)), found.columns_TM.new_empty((block, most))
    for first in range(0, tokens, block):
        x_BW = logits_TW[first : first + block]
        rows, grid = len(x_BW), Grid(len(x_BW), width)
        _chunks[grid.programs](
            x_BW, scratch_3BC, *x_BW.stride(), width, block, chunks, grid.parts, grid.part_columns, scale,
            AT_ONE=at_one, **shape,
        )  # fmt: skip
        _list[rows,](
            scratch_3BC, listed_BQ, told_5B, chunks, block, top_k, scale, C=power, N=list_lanes, Q=most, AT_ONE=at_one,
            num_warps=list_lanes // 32, maxnreg=80,
        )  # fmt: skip
        _look_up[rows,](
            x_BW, listed_BQ, told_5B, found.columns_TM[first:], found.x_TM[first:], found.rest_4T[:, first:],
            *x_BW.stride(), width, block, tokens, scale, Q=most, M=most, G=32, AT_ONE=at_one, maxnreg=80, **shape,
        )  # fmt: skip


@triton.jit
def _chunks(
    logits, scratch, row_stride, column_stride, width, tokens, chunks, parts, part_columns, scale,
    AT_ONE: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row, _, start, stop = place(parts, part_columns, width)
    logits += row * row_stride
    lane = tl.cast(tokens, tl.int64) * chunks
    for first in range(start, stop, S * LANES * E):
        x_SNE = load_tile(logits, first, stop, column_stride, S, E)
        zero_SNE = x_SNE * 0.0  # NaN where x is not finite
        if first + S * LANES * E > stop:
            zero_SNE = tl.where(tile_columns(S, E) < stop - first, zero_SNE, 0.0)
        max_N = lane_max(x_SNE)
        below_SNE = x_SNE - finite(max_N)[None, :, None]
        chunk = scratch + row * chunks + first // (S * E) + tl.arange(0, LANES)
        tl.store(chunk, max_N + lane_sum(zero_SNE))
        tl.store(chunk + lane, lane_sum(tl.exp2(below_SNE * scale)))
        if AT_ONE:
            tl.store(chunk + 2 * lane, lane_sum(tl.exp2(below_SNE * IN_LOG2)))


@triton.jit
def _list(
    scratch, listed, told, chunks, tokens, top_k, scale, C: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    AT_ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, C // (4 * N))[:, None, None] * (4 * N) + tl.arange(0, N)[None, :, None] * 4
    chunk = lanes + tl.arange(0, 4)[None, None, :]
    real = chunk < chunks
    scratch += row * chunks + chunk
    lane = tl.cast(tokens, tl.int64) * chunks
    max_SN4 = tl.load(scratch, mask=real, other=-float("inf"))
    broken = tl.max(lane_max((max_SN4 != max_SN4).to(tl.int32)), 0) != 0
    bound = _bound(max_SN4, top_k, top_k + top_k // 8)
    reach = (max_SN4 >= bound) & real
    slot, reached = find_slots(reach)
    tl.store(listed + row * Q + slot, chunk, mask=reach & (slot < Q))
    left = tl.where(reach, -float("inf"), max_SN4)
    top = tl.max(lane_max(left), 0)
    sum_SN4 = tl.load(scratch + lane, mask=real, other=0.0)
    told += row
    tl.store(told, bound)
    tl.store(told + tokens, tl.where(broken, -1, reached).to(tl.float32))
    tl.store(told + 2 * tokens, top)
    tl.store(told + 3 * tokens, tl.sum(lane_sum(sum_SN4 * tl.exp2((left - finite(top)) * scale)), 0))
    if AT_ONE:
        sum_SN4 = tl.load(scratch + 2 * lane, mask=real, other=0.0)
        tl.store(told + 4 * tokens, tl.sum(lane_sum(sum_SN4 * tl.exp2((left - finite(top)) * IN_LOG2)), 0))


@triton.jit
def _bound(max_SN4, top_k, enough):
    """A number that at least top_k of the maxima reach; and no more than `enough` of them, but for equal ones."""
    order = ordered(max_SN4)
    low, high = -tl.max(lane_max(-order), 0), tl.max(lane_max(order), 0)
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    reached = tl.sum(lane_sum((order >= low.to(tl.int32)).to(tl.int32)), 0)
    while (reached > enough) & (high - low > 1):
        middle = (low + high) >> 1
        count = tl.sum(lane_sum((order >= middle.to(tl.int32)).to(tl.int32)), 0)
        fits = count >= top_k
        low, high = tl.where(fits, middle, low), tl.where(fits, high, middle)
        reached = tl.where(fits, count, reached)
    low = low.to(tl.int32)
    return tl.where(low < 0, low ^ 0x7FFFFFFF, low).to(tl.float32, bitcast=True)


@triton.jit
def _look_up(
    logits, listed, told, columns, values, rest, row_stride, column_stride, width, told_tokens, tokens, scale,
    Q: tl.constexpr, M: tl.constexpr, G: tl.constexpr, AT_ONE: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    columns += row * M
    values += row * M
    told += row
    bound, reached = tl.load(told), tl.load(told + told_tokens)
    max_, sum_, at_one = tl.load(told + 2 * told_tokens), tl.load(told + 3 * told_tokens), 0.0
    if AT_ONE:
        at_one = tl.load(told + 4 * told_tokens)
    looked_up = tl.minimum(reached, Q).to(tl.int32)
    found = 0
    for first in range(0, looked_up, G):
        g = first + tl.arange(0, G)
        chunk_G = tl.load(listed + row * Q + g, mask=g < looked_up, other=0)
        column_G = chunk_G // LANES * (S * LANES * E) + chunk_G % LANES * E
        inside = tl.arange(0, S)[:, None, None] * (LANES * E) + tl.arange(0, E)[None, None, :]
        column_SGE = column_G[None, :, None] + inside
        here = (g < looked_up)[None, :, None] & (column_SGE < width)
        x_SGE = tl.load(logits + column_SGE.to(tl.int64) * column_stride, mask=here).to(tl.float32)
        x_SGE = tl.where(here, x_SGE, -float("inf"))
        reach = x_SGE >= bound
        slot, count = find_slots(reach)
        slot += found
        tl.store(columns + slot, column_SGE, mask=reach & (slot < M))
        tl.store(values + slot, x_SGE.to(values.dtype.element_ty), mask=reach & (slot < M))
        found += count
        x_SGE = tl.where(reach, -float("inf"), x_SGE)
        top = tl.maximum(max_, tl.max(lane_max(x_SGE), 0))
        gap, below_SGE = max_ - finite(top), x_SGE - finite(top)
        sum_ = sum_ * tl.exp2(gap * scale) + tl.sum(lane_sum(tl.exp2(below_SGE * scale)), 0)
        if AT_ONE:
            at_one = at_one * tl.exp2(gap * IN_LOG2) + tl.sum(lane_sum(tl.exp2(below_SGE * IN_LOG2)), 0)
        max_ = top
    empty_slots(columns, values, found, reached < 0, M)
    state = tl.where((reached > Q) | (found > M), CROWDED, 0.0)
    store_rest(rest + row, tokens, max_, sum_, at_one, state, AT_ONE)
