"""`rows.summarize` in Triton: one read of the logits, maximum and sums of exponentials of every chunk of columns.

A lane owns E neighbouring chunks, column j being in chunk j % C, and goes through them S rows of C columns at a time.
A row that holds anything but finite numbers is marked by the program that finds one, and spoilt by a second kernel.

Sizes: T tokens, W columns, C chunks, P parts of the chunks; S, N, E in tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.rows import Chunks
from megakd.kernels.triton.tiles import IN_LOG2, LANES, LOG2_E, NONE, finite, lane_shape, on_its_device


@on_its_device
def summarize(
    logits_TW: Tensor,
    width: int,
    chunks: int,
    temperature: float,
    *,
    at_one: bool = False,
    drift: bool = False,
    column: bool = False,
) -> Chunks:
    """See `rows.summarize`."""
    tokens, shape = len(logits_TW), lane_shape(logits_TW, multiple_of=chunks)
    parts = triton.cdiv(chunks, LANES.value * shape["E"])
    max_TC = logits_TW.new_empty((tokens, chunks), dtype=torch.float32)
    sum_TC, broken_TP = torch.empty_like(max_TC), logits_TW.new_empty((tokens, parts), dtype=torch.int32)
    sum_at_one_TC, drift_TC = (torch.empty_like(max_TC) if wanted else None for wanted in (at_one, drift))
    column_TC = torch.empty_like(max_TC, dtype=torch.int32) if column else None
    if tokens:
        _summarize[tokens * parts,](
            logits_TW, max_TC, sum_TC, sum_at_one_TC, drift_TC, column_TC, broken_TP, *logits_TW.stride(), width,
            chunks, parts, LOG2_E / temperature, AT_ONE=at_one, DRIFT=drift, COLUMN=column, **shape,
        )  # fmt: skip
        _spoil[tokens,](max_TC, broken_TP, chunks, parts, P=triton.next_power_of_2(parts))
    return Chunks(max_TC, sum_TC, sum_at_one_TC, drift_TC, column_TC)


@triton.jit
def _summarize(
    logits, maxima, sums, sums_at_one, drifts, columns, broken, row_stride, column_stride, width, chunks, parts, scale,
    AT_ONE: tl.constexpr, DRIFT: tl.constexpr, COLUMN: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    first = part * LANES * E
    chunk_NE = first + tl.arange(0, LANES)[:, None] * E + tl.arange(0, E)[None, :]
    zero_NE = tl.zeros((LANES, E), tl.float32)
    max_NE, sum_NE, at_one_NE, drift_NE = zero_NE - float("inf"), zero_NE, zero_NE, zero_NE
    step_SNE = tl.arange(0, S)[:, None, None]
    max_step_NE = tl.zeros((LANES, E), tl.int32)
    logits += row * row_stride
    for step in range(0, tl.cdiv(width, chunks), S):
        column_SNE = (step + step_SNE) * chunks + chunk_NE[None, :, :]
        x = logits + column_SNE.to(tl.int64) * column_stride
        if ((step + S) * chunks <= width) & (first + LANES * E <= chunks):
            x_SNE = tl.load(x, eviction_policy="evict_first").to(tl.float32)
            zero_NE += tl.sum(x_SNE * 0.0, 0)
        else:
            here = (column_SNE < width) & (chunk_NE < chunks)[None, :, :]
            x_SNE = tl.load(x, mask=here).to(tl.float32)
            zero_NE += tl.sum(tl.where(here, x_SNE * 0.0, 0.0), 0)
            x_SNE = tl.where(here, x_SNE, -float("inf"))
        top_NE = tl.maximum(max_NE, tl.max(x_SNE, 0))
        gap_NE, below_SNE = max_NE - finite(top_NE), x_SNE - finite(top_NE)[None, :, :]
        e_SNE, moved_NE = tl.exp2(below_SNE * scale), tl.exp2(gap_NE * scale)
        if DRIFT:  # in units of log 2
            drift_NE = tl.where(moved_NE > 0, moved_NE * (drift_NE + sum_NE * (gap_NE * scale)), 0.0)
            drift_NE += tl.sum(tl.where(e_SNE > 0, e_SNE * (below_SNE * scale), 0.0), 0)
        sum_NE = sum_NE * moved_NE + tl.sum(e_SNE, 0)
        if AT_ONE:
            at_one_NE = at_one_NE * tl.exp2(gap_NE * IN_LOG2) + tl.sum(tl.exp2(below_SNE * IN_LOG2), 0)
        if COLUMN:
            first_NE = tl.min(tl.where(x_SNE == top_NE[None, :, :], step + step_SNE, NONE), 0)
            max_step_NE = tl.where(top_NE > max_NE, first_NE, max_step_NE)
        max_NE = top_NE
    here_NE, column_NE, chunk_NE = chunk_NE < chunks, max_step_NE * chunks + chunk_NE, row * chunks + chunk_NE
    if COLUMN:
        tl.store(columns + chunk_NE, column_NE, mask=here_NE)
    tl.store(maxima + chunk_NE, max_NE, mask=here_NE)
    tl.store(sums + chunk_NE, sum_NE, mask=here_NE)
    if AT_ONE:
        tl.store(sums_at_one + chunk_NE, at_one_NE, mask=here_NE)
    if DRIFT:
        tl.store(drifts + chunk_NE, drift_NE / IN_LOG2, mask=here_NE)
    tl.store(broken + row * parts + part, tl.max(tl.max((zero_NE != 0.0).to(tl.int32), 1), 0))


@triton.jit
def _spoil(maxima, broken, chunks, parts, P: tl.constexpr):
    """Fills the maxima of a marked row with NaN."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, P)
    if tl.max(tl.load(broken + row * parts + p, mask=p < parts, other=0), 0) > 0:
        for first in range(0, chunks, 1024):
            chunk = first + tl.arange(0, 1024)
            tl.store(maxima + row * chunks + chunk, float("nan"), mask=chunk < chunks)
