"""The passes of select_top_k in Triton: one read of the teacher's logits, and a second look at a few columns.

1. `_chunks` reads the logits. A chunk is what a lane holds of a tile; its maximum and sum of exponentials are kept.
2. `_list` finds by bisection a bound that at least K chunk maxima reach, and few more. Then K logits reach it, and a
   column below it is not among the K largest. It lists the chunks whose maxima reach it, and sums up the others.
3. `_look_up` reads the listed chunks. The columns that reach the bound, about K, are the candidates; the others are
   added to the sum, each once: nothing is ever subtracted from a total.
4. `_take`, when the ranks have agreed on a threshold, picks from the candidates those above it, and of those equal to
   it as many as are missing, by ascending column.

A row with so many equal logits that its candidates do not fit, and a shard too narrow for chunks, are left to PyTorch.

Sizes: T tokens, K entries, W columns, C chunks, Q chunks listed and M candidates of a row at most, G chunks looked
up together; S, N, E in tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels import selection_rows
from megakd.kernels.triton.tiles import (
    LANES,
    LOG2_E,
    NONE,
    Grid,
    finite,
    lane_max,
    lane_shape,
    lane_sum,
    load_tile,
    on_its_device,
    place,
    tile_columns,
)
from megakd.kernels.vocab import VocabShard

SCRATCH_BYTES = 32 << 20  # for the chunks of as many rows as are passed over together: they stay in the L2 cache
SMALLEST_CHUNK = 8  # columns
CROWDED, BROKEN = tl.constexpr(1.0), tl.constexpr(2.0)  # states of a row, other than 0


class Scan(NamedTuple):
    """What is known of this rank's rows before the ranks have spoken; see `selection_rows.Scan`.

    packed_TM: the candidates, in no order; int64, the bits of the float32 logit above those of the int32 column; -inf
        and -1 for none.
    rest_3T: largest of all other logits, their sum of exp((x - max) / temperature), and the row's state.
    crowded: the rows whose candidates did not fit.
    """

    values_TL: Tensor
    packed_TM: Tensor
    rest_3T: Tensor
    crowded: Tensor


@on_its_device
def scan_rows(logits_TW: Tensor, top_k: int, shard: VocabShard, temperature: float) -> "Scan | selection_rows.Scan":
    """See `selection_rows.scan_rows`."""
    tokens, width = len(logits_TW), shard.real_width
    shape = lane_shape(logits_TW)
    while width < 2 * top_k * shape["S"] * shape["E"] and shape["S"] * shape["E"] > SMALLEST_CHUNK:
        shape["S"] //= 2
    if not tokens or width < 2 * top_k * shape["S"] * shape["E"]:
        return selection_rows.scan_rows(logits_TW, top_k, shard, temperature)
    packed_TM, rest_3T = find_candidates(logits_TW, top_k, width, temperature, shape)
    x_TM = packed_TM.view(torch.float32)[:, 1::2]
    values_TL = x_TM.topk(top_k, 1, sorted=False).values.masked_fill(rest_3T[2, :, None] == BROKEN.value, torch.nan)
    crowded = (rest_3T[2] == CROWDED.value).nonzero()[:, 0]
    for rows in crowded.split(32) if len(crowded) else ():
        values_TL[rows] = logits_TW[rows, :width].float().topk(top_k, 1, sorted=False).values
    return Scan(values_TL.to(logits_TW.dtype), packed_TM, rest_3T, crowded)


def find_candidates(
    logits_TW: Tensor, top_k: int, width: int, temperature: float, shape: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """The candidates and what remains, as in Scan; `shape` is that of a lane and its chunks."""
    tokens, most, scale = len(logits_TW), triton.next_power_of_2(max(16, top_k)), LOG2_E / temperature
    chunks = triton.cdiv(width, shape["S"] * shape["E"] * LANES.value) * LANES.value
    power = max(512, triton.next_power_of_2(chunks))
    list_lanes = min(512, power // 16)
    block = min(tokens, max(1, SCRATCH_BYTES // (8 * chunks)))
    packed_TM = torch.empty((tokens, 4 * most), dtype=torch.int64, device=logits_TW.device)
    rest_3T = logits_TW.new_empty((3, tokens), dtype=torch.float32)
    max_BC, sum_BC = rest_3T.new_empty((2, block, chunks))
    told_4B, listed_BQ = rest_3T.new_empty((4, block)), packed_TM.new_empty((block, 2 * most), dtype=torch.int32)
    for first in range(0, tokens, block):
        x_BW = logits_TW[first : first + block]
        rows, grid = len(x_BW), Grid(len(x_BW), width)
        _chunks[grid.programs](
            x_BW, max_BC, sum_BC, *x_BW.stride(), width, chunks, grid.parts, grid.part_columns, scale, **shape
        )
        _list[rows,](
            max_BC, sum_BC, listed_BQ, told_4B, chunks, block, top_k, scale, C=power, N=list_lanes, Q=2 * most,
            num_warps=list_lanes // 32, maxnreg=80,
        )  # fmt: skip
        _look_up[rows,](
            x_BW, listed_BQ, told_4B, packed_TM[first:], rest_3T[:, first:], *x_BW.stride(), width, block, tokens,
            scale, Q=2 * most, M=4 * most, G=32, maxnreg=80, **shape,
        )  # fmt: skip
    return packed_TM, rest_3T


@triton.jit
def _chunks(
    logits, maxima, sums, row_stride, column_stride, width, chunks, parts, part_columns, scale, S: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    row, _, start, stop = place(parts, part_columns, width)
    logits += row * row_stride
    for first in range(start, stop, S * LANES * E):
        x_SNE = load_tile(logits, first, stop, column_stride, S, E)
        zero_SNE = x_SNE * 0.0  # NaN where x is not finite
        if first + S * LANES * E > stop:
            zero_SNE = tl.where(tile_columns(S, E) < stop - first, zero_SNE, 0.0)
        max_N = lane_max(x_SNE)
        sum_N = lane_sum(tl.exp2((x_SNE - finite(max_N)[None, :, None]) * scale))
        chunk = row * chunks + first // (S * E) + tl.arange(0, LANES)
        tl.store(maxima + chunk, max_N + lane_sum(zero_SNE))
        tl.store(sums + chunk, sum_N)


@triton.jit
def _list(maxima, sums, listed, told, chunks, tokens, top_k, scale, C: tl.constexpr, N: tl.constexpr, Q: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, C // (4 * N))[:, None, None] * (4 * N) + tl.arange(0, N)[None, :, None] * 4
    chunk = lanes + tl.arange(0, 4)[None, None, :]
    real = chunk < chunks
    max_SN4 = tl.load(maxima + row * chunks + chunk, mask=real, other=-float("inf"))
    broken = tl.max(lane_max((max_SN4 != max_SN4).to(tl.int32)), 0) != 0
    bound = _bound(max_SN4, top_k, top_k + top_k // 4)
    reach = (max_SN4 >= bound) & real
    slot, reached = _slots(reach)
    tl.store(listed + row * Q + slot, chunk, mask=reach & (slot < Q))
    left = tl.where(reach, -float("inf"), max_SN4)
    top = tl.max(lane_max(left), 0)
    sum_SN4 = tl.load(sums + row * chunks + chunk, mask=real, other=0.0)
    told += row
    tl.store(told, bound)
    tl.store(told + tokens, tl.where(broken, -1, reached).to(tl.float32))
    tl.store(told + 2 * tokens, top)
    tl.store(told + 3 * tokens, tl.sum(lane_sum(sum_SN4 * tl.exp2((left - finite(top)) * scale)), 0))


@triton.jit
def _bound(max_SN4, top_k, enough):
    """A number that at least top_k of the maxima reach; and no more than `enough` of them, but for equal ones."""
    bits = max_SN4.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
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
def _slots(flag_SNE):
    """A slot for each flag that is set, from 0 on, lane by lane; and their number."""
    flag_SNE = flag_SNE.to(tl.int32)
    count_SN = tl.sum(flag_SNE, 2)
    count_N = tl.sum(count_SN, 0)
    before_SN = (tl.cumsum(count_N, 0) - count_N)[None, :] + tl.cumsum(count_SN, 0) - count_SN
    return before_SN[:, :, None] + tl.cumsum(flag_SNE, 2) - 1, tl.sum(count_N, 0)


@triton.jit
def _pack(x, column):
    return (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | column.to(tl.int64)


@triton.jit
def _look_up(
    logits, listed, told, packed, rest, row_stride, column_stride, width, told_tokens, tokens, scale, Q: tl.constexpr,
    M: tl.constexpr, G: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    packed += row * M
    told += row
    bound, reached = tl.load(told), tl.load(told + told_tokens)
    max_, sum_ = tl.load(told + 2 * told_tokens), tl.load(told + 3 * told_tokens)
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
        slot, count = _slots(reach)
        slot += found
        tl.store(packed + slot, _pack(x_SGE, column_SGE), mask=reach & (slot < M))
        found += count
        x_SGE = tl.where(reach, -float("inf"), x_SGE)
        top = tl.maximum(max_, tl.max(lane_max(x_SGE), 0))
        sum_ = sum_ * tl.exp2((max_ - finite(top)) * scale)
        sum_ += tl.sum(lane_sum(tl.exp2((x_SGE - finite(top)) * scale)), 0)
        max_ = top
    m = tl.arange(0, M)
    nothing_M = _pack(tl.full((M,), -float("inf"), tl.float32), tl.full((M,), 0, tl.int32)) | 0xFFFFFFFF
    tl.store(packed + m, nothing_M, mask=m >= found)
    tl.store(rest + row, max_)
    tl.store(rest + tokens + row, sum_)
    state = tl.where((reached > Q) | (found > M), CROWDED, 0.0)
    tl.store(rest + 2 * tokens + row, tl.where(reached < 0, BROKEN, state))


@on_its_device
def take_entries(
    logits_TW: Tensor,
    scan: "Scan | selection_rows.Scan",
    threshold_T: Tensor,
    ties_T: Tensor,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """See `selection_rows.take_entries`."""
    if isinstance(scan, selection_rows.Scan):
        return selection_rows.take_entries(logits_TW, scan, threshold_T, ties_T, top_k, temperature)
    tokens, most = scan.packed_TM.shape
    columns_TK = torch.empty((tokens, top_k), dtype=torch.int64, device=logits_TW.device)
    record_T4 = scan.rest_3T.new_empty((tokens, 4))
    _take[tokens,](
        scan.packed_TM, scan.rest_3T, threshold_T.float(), ties_T, columns_TK, record_T4, logits_TW.shape[1], tokens,
        top_k, LOG2_E / temperature, M=most, K=triton.next_power_of_2(top_k), num_warps=max(1, min(8, most // 256)),
    )  # fmt: skip
    selection_rows.retake_rows(scan.crowded, logits_TW, threshold_T, ties_T, columns_TK, record_T4, temperature)
    return columns_TK, record_T4


@triton.jit
def _take(
    packed, rest, thresholds, ties, entries, record, width, tokens, top_k, scale, M: tl.constexpr, K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    packed_M = tl.load(packed + row * M + tl.arange(0, M))
    x_M = (packed_M >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    column_M = packed_M.to(tl.int32)
    threshold, missing = tl.load(thresholds + row), tl.load(ties + row).to(tl.int32)
    equal_M = x_M == threshold
    low, high = -1, width - 1  # of the equal ones, at most `missing` have a column up to `low`
    low = tl.where(tl.sum(equal_M.to(tl.int32), 0) <= missing, high, low)
    while high - low > 1:
        middle = (low + high) >> 1
        fits = tl.sum((equal_M & (column_M <= middle)).to(tl.int32), 0) <= missing
        low, high = tl.where(fits, middle, low), tl.where(fits, high, middle)
    kept_M = (x_M > threshold) | (equal_M & (column_M <= low))

    entries += row * top_k
    slot_M = tl.cumsum(kept_M.to(tl.int32), 0) - 1
    tl.store(entries + slot_M, column_M.to(tl.int64), mask=kept_M & (slot_M < top_k))
    tl.debug_barrier()
    k = tl.arange(0, K)
    entry_K = tl.load(entries + k, mask=k < tl.sum(kept_M.to(tl.int32), 0), other=NONE).to(tl.int32)
    entry_K = tl.sort(entry_K)
    tl.debug_barrier()
    tl.store(entries + k, tl.where(entry_K == NONE, -1, entry_K).to(tl.int64), mask=k < top_k)

    before, before_sum = tl.load(rest + row), tl.load(rest + tokens + row)
    outside_M, inside_M = tl.where(kept_M, -float("inf"), x_M), tl.where(kept_M, x_M, -float("inf"))
    outside, inside = tl.maximum(before, tl.max(outside_M, 0)), tl.max(inside_M, 0)
    outside_sum = before_sum * tl.exp2((before - finite(outside)) * scale)
    outside_sum += tl.sum(tl.exp2((outside_M - finite(outside)) * scale), 0)
    tl.store(record + row * 4, outside)
    tl.store(record + row * 4 + 1, outside_sum)
    tl.store(record + row * 4 + 2, inside)
    tl.store(record + row * 4 + 3, tl.sum(tl.exp2((inside_M - finite(inside)) * scale), 0))
