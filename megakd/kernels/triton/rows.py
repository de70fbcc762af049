"""The row passes of `megakd.kernels.rows` in Triton: the same functions, signatures and results.

    statistics   The entries of a row are left out of its sum inside the tile they fall into: each lane gathers a word
                 with one bit for each of its columns, so that K entries cost a few instructions each, several of them
                 at a time, and none touches a tile it is not in.
    backward     Every column gets the formula for those outside; then, past a barrier, the label and the entries are
                 written over it. What is read of a tile is read before the tile is written, so out may be the logits.
    extremes     Each lane remembers the tile of its maximum; the column is looked up at the end.

A row that is not supervised is not read. All arithmetic is float32; a result is rounded once, when it is stored.

Sizes: T tokens, K entries per token, W columns, P parts of a row; S, N, E in tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.rows import Extremes, Statistics
from megakd.kernels.triton.chunks import summarize
from megakd.kernels.triton.tiles import (
    IN_LOG2,
    LANES,
    LOG2_E,
    NONE,
    TILE,
    Grid,
    absorb,
    lane_shape,
    load_tile,
    meet,
    no_columns,
    on_its_device,
    place,
    store_tile,
    tile_columns,
)

__all__ = ["backward", "extremes", "statistics", "summarize"]


@on_its_device
def statistics(
    logits_TW: Tensor, columns_TK: Tensor, label_columns_T: Tensor, supervised_T: Tensor, width: int, temperature: float
) -> Statistics:
    """See `rows.statistics`."""
    tokens, top_k = columns_TK.shape
    grid, at_one = Grid(tokens, width), temperature != 1
    partial_3TP = logits_TW.new_empty((2 + at_one, tokens, grid.parts), dtype=torch.float32)
    entry_logits_TK = partial_3TP.new_empty((tokens, top_k))
    label_logit_T = partial_3TP.new_empty(tokens)
    columns_TK = columns_TK.to(torch.int32).contiguous()
    if tokens:
        _statistics[grid.programs](
            logits_TW, columns_TK.sort(1).values.contiguous(), columns_TK, label_columns_T, supervised_T, partial_3TP,
            entry_logits_TK, label_logit_T, *logits_TW.stride(), width, top_k, tokens, grid.parts, grid.part_columns,
            LOG2_E / temperature, AT_ONE=at_one, K=triton.next_power_of_2(max(1, top_k)),
            ABREAST=abreast(top_k, width), **lane_shape(logits_TW),
        )  # fmt: skip
    max_T, sum_T, *sum_at_one_T = _merge_parts(partial_3TP, temperature)
    return Statistics(max_T, sum_T, *(sum_at_one_T or [None]), entry_logits_TK, label_logit_T)


def abreast(top_k: int, width: int) -> int:
    """How many entries of a tile are looked at together: as many as it has on average, a power of 2, and 8 at most.

    Their loads do not wait for one another, which is most of what an entry costs.
    """
    return min(8, triton.next_power_of_2(max(1, top_k * TILE.value // max(1, width))))


@triton.jit
def _statistics(
    logits, ordered, columns, label_columns, supervised, partial, entry_logits, label_logits, row_stride, column_stride,
    width, entries, tokens, parts, part_columns, scale, AT_ONE: tl.constexpr, K: tl.constexpr,
    ABREAST: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row, part, start, stop = place(parts, part_columns, width)
    on = tl.load(supervised + row) != 0
    stop = tl.where(on, stop, start)
    logits += row * row_stride
    columns += row * entries
    ordered += row * entries

    k = tl.arange(0, K)
    column_K = tl.load(columns + k, mask=k < entries, other=-1)
    here_K = (column_K >= start) & (column_K < stop)
    nowhere_K = (k < entries) & (part == 0) & ((column_K < 0) | (not on))
    x_K = tl.load(logits + column_K.to(tl.int64) * column_stride, mask=here_K).to(tl.float32)
    tl.store(entry_logits + row * entries + k, tl.where(here_K, x_K, -float("inf")), mask=here_K | nowhere_K)
    _fetch_label(logits, label_columns, label_logits, row, part, start, stop, on, column_stride)

    max_N, sum_N, sum_at_one_N = no_columns()
    lane_N = tl.arange(0, LANES).to(tl.uint32)
    entry = tl.sum((tl.load(ordered + k, mask=k < entries, other=NONE) < start).to(tl.int32), 0)
    column = tl.load(ordered + entry, mask=entry < entries, other=NONE)
    for first in range(start, stop, TILE):
        x_SNE = load_tile(logits, first, stop, column_stride, S, E)
        if column < first + TILE:
            word_N = tl.zeros((LANES,), tl.int32)
            while column < first + TILE:
                found = 0
                for i in tl.static_range(ABREAST):
                    column = tl.load(ordered + entry + i, mask=entry + i < entries, other=NONE)
                    at = (column - first).to(tl.uint32)  # divides by shifts alone
                    bit = (at // (LANES * E) * E + at % E).to(tl.int32)
                    inside = at < TILE
                    word_N |= tl.where((lane_N == at // E % LANES) & inside, 1 << bit, 0)
                    found += inside.to(tl.int32)
                entry += found
                column = tl.load(ordered + entry, mask=entry < entries, other=NONE)
            bit_SNE = tl.arange(0, S)[:, None, None] * E + tl.arange(0, E)[None, None, :]
            x_SNE = tl.where((word_N[None, :, None] >> bit_SNE) & 1 != 0, -float("inf"), x_SNE)
        max_N, sum_N, sum_at_one_N = absorb(x_SNE, max_N, sum_N, sum_at_one_N, scale, AT_ONE)

    partial += row * parts + part
    lane = tl.cast(tokens, tl.int64) * parts
    tl.store(partial, tl.max(max_N, 0))
    tl.store(partial + lane, meet(max_N, sum_N, scale))
    if AT_ONE:
        tl.store(partial + 2 * lane, meet(max_N, sum_at_one_N, IN_LOG2))


@triton.jit
def _fetch_label(logits, label_columns, label_logits, row, part, start, stop, on, column_stride):
    """The part that holds the label's column writes its logit; the first part writes -inf where none does."""
    label = tl.load(label_columns + row)
    here = (label >= start) & (label < stop)
    x = tl.load(logits + label * column_stride, mask=here).to(tl.float32)
    nowhere = (part == 0) & ((label < 0) | (not on))
    tl.store(label_logits + row, tl.where(here, x, -float("inf")), mask=here | nowhere)


@on_its_device
def backward(
    logits_TW: Tensor,
    columns_TK: Tensor,
    label_columns_T: Tensor,
    supervised_T: Tensor,
    width: int,
    temperature: float,
    max_T: Tensor,
    outside_T: Tensor,
    outside_at_one_T: Tensor | None,
    entry_grad_TK: Tensor,
    label_grad_T: Tensor,
    out_TW: Tensor,
) -> None:
    """See `rows.backward`."""
    tokens, whole_width = logits_TW.shape
    top_k, grid = columns_TK.shape[1], Grid(tokens, whole_width)
    if tokens and whole_width:
        _backward[grid.programs](
            logits_TW, columns_TK.contiguous(), label_columns_T, supervised_T, max_T, outside_T, outside_at_one_T,
            entry_grad_TK.contiguous(), label_grad_T, out_TW, *logits_TW.stride(), *out_TW.stride(), width, whole_width,
            top_k, grid.parts, grid.part_columns, LOG2_E / temperature, AT_ONE=outside_at_one_T is not None,
            K=triton.next_power_of_2(max(1, top_k)), **lane_shape(logits_TW, out_TW),
        )  # fmt: skip
        torch.autograd.graph.increment_version(out_TW)  # autograd sees no write through a pointer


@triton.jit
def _backward(
    logits, columns, label_columns, supervised, max_, outside, outside_at_one, entry_grad, label_grad, out, row_stride,
    column_stride, out_row_stride, out_column_stride, width, whole_width, entries, parts, part_columns, scale,
    AT_ONE: tl.constexpr, K: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row, _, start, whole_stop = place(parts, part_columns, whole_width)
    on = tl.load(supervised + row) != 0
    stop = tl.where(on, tl.minimum(whole_stop, width), start)
    logits += row * row_stride
    out += row * out_row_stride
    top, factor, factor_at_one = tl.load(max_ + row), tl.load(outside + row), 0.0
    if AT_ONE:
        factor_at_one = tl.load(outside_at_one + row)
    label = tl.load(label_columns + row)
    has_label = (label >= start) & (label < stop)
    x = tl.load(logits + label * column_stride, mask=has_label).to(tl.float32)
    tl.debug_barrier()  # no warp writes before all have read the label's logit: out may be the logits

    for first in range(start, whole_stop, TILE):
        value_SNE = tl.zeros((S, LANES, E), tl.float32)
        if first < stop:
            x_SNE = load_tile(logits, first, stop, column_stride, S, E)
            value_SNE = _outside(x_SNE, top, factor, factor_at_one, scale, AT_ONE)
        store_tile(out, value_SNE, first, stop, whole_stop, out_column_stride, S, E)

    tl.debug_barrier()
    value = _outside(x, top, factor, factor_at_one, scale, AT_ONE) + tl.load(label_grad + row)
    tl.store(out + label * out_column_stride, value.to(out.dtype.element_ty), mask=has_label)
    tl.debug_barrier()
    k = tl.arange(0, K)
    column_K = tl.load(columns + row * entries + k, mask=k < entries, other=-1)
    here_K = (column_K >= start) & (column_K < stop)
    value_K = tl.load(entry_grad + row * entries + k, mask=here_K)
    tl.store(out + column_K * out_column_stride, value_K.to(out.dtype.element_ty), mask=here_K)


@triton.jit
def _outside(x, top, factor, factor_at_one, scale, AT_ONE: tl.constexpr):
    """The gradient of a column that is neither the label's nor an entry's."""
    value = factor * tl.exp2((x - top) * scale)
    if AT_ONE:
        value += factor_at_one * tl.exp2((x - top) * IN_LOG2)
    return value


@on_its_device
def extremes(logits_TW: Tensor, label_columns_T: Tensor, width: int) -> Extremes:
    """See `rows.extremes`."""
    tokens = len(logits_TW)
    grid = Grid(tokens, width)
    partial_3TP = logits_TW.new_empty((2, tokens, grid.parts), dtype=torch.float32)
    column_TP = logits_TW.new_empty((tokens, grid.parts), dtype=torch.int64)
    label_logit_T = torch.empty_like(label_columns_T, dtype=torch.float32)
    if tokens:
        _extremes[grid.programs](
            logits_TW, label_columns_T, partial_3TP, column_TP, label_logit_T, *logits_TW.stride(), width, tokens,
            grid.parts, grid.part_columns, **lane_shape(logits_TW),
        )  # fmt: skip
    max_T, sum_T = _merge_parts(partial_3TP, 1.0)
    if grid.parts > 1:
        column_TP = column_TP.where(partial_3TP[0] == max_T[:, None], NONE.value).amin(1, keepdim=True)
    return Extremes(max_T, column_TP[:, 0], sum_T, label_logit_T)


@triton.jit
def _extremes(
    logits, label_columns, partial, columns, label_logits, row_stride, column_stride, width, tokens, parts,
    part_columns, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row, part, start, stop = place(parts, part_columns, width)
    logits += row * row_stride
    _fetch_label(logits, label_columns, label_logits, row, part, start, stop, True, column_stride)
    max_N, sum_N, sum_at_one_N = no_columns()
    first_N = tl.zeros((LANES,), tl.int32) + start
    for first in range(start, stop, TILE):
        x_SNE = load_tile(logits, first, stop, column_stride, S, E)
        before_N = max_N
        max_N, sum_N, sum_at_one_N = absorb(x_SNE, max_N, sum_N, sum_at_one_N, IN_LOG2, False)
        first_N = tl.where(max_N > before_N, first, first_N)
    top = tl.max(max_N, 0)
    column_SNE = first_N[None, :, None] + tile_columns(S, E)
    here = (max_N == top)[None, :, None] & (column_SNE < stop)
    x_SNE = tl.load(logits + column_SNE.to(tl.int64) * column_stride, mask=here).to(tl.float32)
    column = tl.min(tl.min(tl.min(tl.where(here & (x_SNE == top), column_SNE, NONE), 2), 0), 0)
    partial += row * parts + part
    tl.store(partial, top)
    tl.store(partial + tl.cast(tokens, tl.int64) * parts, meet(max_N, sum_N, IN_LOG2))
    tl.store(columns + row * parts + part, tl.minimum(column, tl.maximum(width - 1, 0)).to(tl.int64))


def _merge_parts(partial_3TP: Tensor, temperature: float) -> Tensor:
    """Maximum and sums of whole rows, [2 or 3, T], from those of their parts."""
    lanes, tokens, parts = partial_3TP.shape
    if parts == 1 or not tokens:
        return partial_3TP[:, :, 0]
    merged_3T = torch.empty_like(partial_3TP[:, :, 0])
    _merge[tokens,](
        partial_3TP, merged_3T, tokens, parts, LOG2_E / temperature, AT_ONE=lanes == 3, P=triton.next_power_of_2(parts),
        num_warps=1,
    )  # fmt: skip
    return merged_3T


@triton.jit
def _merge(partial, merged, tokens, parts, scale, AT_ONE: tl.constexpr, P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, P)
    partial += row * parts + p
    merged += row
    lane = tl.cast(tokens, tl.int64)
    max_P = tl.load(partial, mask=p < parts, other=-float("inf"))
    sum_P = tl.load(partial + lane * parts, mask=p < parts, other=0.0)
    tl.store(merged, tl.max(max_P, 0))
    tl.store(merged + lane, meet(max_P, sum_P, scale))
    if AT_ONE:
        sum_P = tl.load(partial + 2 * lane * parts, mask=p < parts, other=0.0)
        tl.store(merged + 2 * lane, meet(max_P, sum_P, IN_LOG2))
