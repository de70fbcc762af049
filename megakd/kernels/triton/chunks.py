"""`rows.summarize` in Triton: one read of the logits, maximum and sum of exponentials of every chunk of columns.

A lane owns E neighbouring chunks, column j being in chunk j % C, and goes through them S rows of C columns at a time.
A row that holds anything but finite numbers is marked by the program that finds one, and spoilt by a second kernel.

Sizes: T tokens, W columns, C chunks, P parts of the chunks; S, N, E in tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.triton.tiles import LANES, LOG2_E, finite, lane_shape, on_its_device


@on_its_device
def summarize(logits_TW: Tensor, width: int, chunks: int, temperature: float) -> tuple[Tensor, Tensor]:
    """See `rows.summarize`."""
    tokens, shape = len(logits_TW), lane_shape(logits_TW, multiple_of=chunks)
    parts = triton.cdiv(chunks, LANES.value * shape["E"])
    max_TC = logits_TW.new_empty((tokens, chunks), dtype=torch.float32)
    sum_TC, broken_TP = torch.empty_like(max_TC), logits_TW.new_empty((tokens, parts), dtype=torch.int32)
    if tokens:
        _summarize[tokens * parts,](
            logits_TW, max_TC, sum_TC, broken_TP, *logits_TW.stride(), width, chunks, parts, LOG2_E / temperature,
            **shape,
        )  # fmt: skip
        _spoil[tokens,](max_TC, broken_TP, chunks, parts, P=triton.next_power_of_2(parts))
    return max_TC, sum_TC


@triton.jit
def _summarize(
    logits, maxima, sums, broken, row_stride, column_stride, width, chunks, parts, scale, S: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    first = part * LANES * E
    chunk_NE = first + tl.arange(0, LANES)[:, None] * E + tl.arange(0, E)[None, :]
    max_NE = tl.full((LANES, E), -float("inf"), tl.float32)
    sum_NE = tl.zeros((LANES, E), tl.float32)
    zero_NE = tl.zeros((LANES, E), tl.float32)
    step_SNE = tl.arange(0, S)[:, None, None]
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
        base_NE = finite(top_NE)
        sum_NE = sum_NE * tl.exp2((max_NE - base_NE) * scale)
        sum_NE += tl.sum(tl.exp2((x_SNE - base_NE[None, :, :]) * scale), 0)
        max_NE = top_NE
    here_NE = chunk_NE < chunks
    tl.store(maxima + row * chunks + chunk_NE, max_NE, mask=here_NE)
    tl.store(sums + row * chunks + chunk_NE, sum_NE, mask=here_NE)
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
