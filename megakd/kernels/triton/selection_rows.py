"""The passes of `megakd.kernels.selection_rows` in Triton: one read of the teacher's logits, a second look at few.

candidates.py finds some K candidates of each row and sums up the others. `_take`, when the ranks have agreed on a
threshold, picks from the candidates those above it, and of those equal to it as many as are missing, by ascending
column; and writes the rank's record.

Sizes: T tokens, K entries, W columns, L values sent by a rank or lanes of its record, M candidates of a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.selection_rows import Chosen
from megakd.kernels.triton.candidates import Candidates, find_candidates
from megakd.kernels.triton.tiles import IN_LOG2, INF, LOG2_E, NONE, finite, on_its_device
from megakd.kernels.vocab import VocabShard


class Scan(NamedTuple):
    """See `selection_rows.Scan`."""

    values_TL: Tensor
    candidates: Candidates


@on_its_device
def scan_rows(logits_TW: Tensor, top_k: int, shard: VocabShard, temperature: float, *, at_one: bool = False) -> Scan:
    """See `selection_rows.scan_rows`."""
    found = find_candidates(logits_TW, top_k, shard.real_width, temperature, at_one=at_one)
    sent = min(top_k, max(logits_TW.shape[1], -(-shard.size // shard.ranks)))
    return Scan(found.x_TM.topk(sent, 1, sorted=False).values, found)


@on_its_device
def take_entries(
    logits_TW: Tensor,
    scan: Scan,
    threshold_T: Tensor,
    ties_T: Tensor,
    top_k: int,
    shard: VocabShard,
    temperature: float,
    labels_T: Tensor | None = None,
) -> Chosen:
    """See `selection_rows.take_entries`."""
    (columns_TM, x_TM, rest_4T), said = scan.candidates, labels_T is not None
    tokens, most = x_TM.shape
    at_one = said and temperature != 1
    ids_TK = threshold_T.new_empty((tokens, top_k), dtype=torch.int64)
    chosen = Chosen(ids_TK, rest_4T.new_empty(ids_TK.shape), rest_4T.new_empty((tokens, 4 + 2 * at_one + 2 * said)))
    if tokens:
        _take[tokens,](
            logits_TW, columns_TM, x_TM, rest_4T, threshold_T, ties_T, labels_T, *chosen, *logits_TW.stride(),
            shard.real_width, shard.start, tokens, top_k, LOG2_E / temperature, SAID=said, AT_ONE=at_one, M=most,
            K=triton.next_power_of_2(top_k), num_warps=max(1, min(8, most // 256)),
        )  # fmt: skip
    return chosen


@triton.jit
def _take(
    logits, columns, values, rest, thresholds, ties, labels, ids, entry_logits, record, row_stride, column_stride,
    width, start, tokens, top_k, scale, SAID: tl.constexpr, AT_ONE: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    m, k = tl.arange(0, M), tl.arange(0, K)
    x_M = tl.load(values + row * M + m).to(tl.float32)
    column_M = tl.load(columns + row * M + m)
    threshold, missing = tl.load(thresholds + row), tl.load(ties + row).to(tl.int32)
    equal_M = x_M == threshold
    low, high = -1, width - 1  # of the equal ones, at most `missing` have a column up to `low`
    low = tl.where(tl.sum(equal_M.to(tl.int32), 0) <= missing, high, low)
    while high - low > 1:
        middle = (low + high) >> 1
        fits = tl.sum((equal_M & (column_M <= middle)).to(tl.int32), 0) <= missing
        low, high = tl.where(fits, middle, low), tl.where(fits, high, middle)
    kept_M = (x_M > threshold) | (equal_M & (column_M <= low))

    logits += row * row_stride
    ids += row * top_k
    slot_M = tl.cumsum(kept_M.to(tl.int32), 0) - 1
    tl.store(ids + slot_M, column_M.to(tl.int64), mask=kept_M & (slot_M < top_k))
    tl.debug_barrier()
    column_K = tl.load(ids + k, mask=k < tl.sum(kept_M.to(tl.int32), 0), other=NONE).to(tl.int32)
    column_K = tl.sort(column_K)
    tl.debug_barrier()
    some_K = column_K != NONE
    x_K = tl.load(logits + column_K.to(tl.int64) * column_stride, mask=some_K).to(tl.float32)
    x_K = tl.where(some_K, x_K, -INF)
    tl.store(ids + k, tl.where(some_K, column_K.to(tl.int64) + start, -1), mask=k < top_k)
    tl.store(entry_logits + row * top_k + k, x_K, mask=k < top_k)

    before, inside = tl.load(rest + row), tl.max(x_K, 0)
    outside_M = tl.where(kept_M, -INF, x_M)
    outside = tl.maximum(before, tl.max(outside_M, 0))
    gap, below_M, below_K = before - finite(outside), outside_M - finite(outside), x_K - finite(inside)
    record += row * (4 + 2 * AT_ONE + 2 * SAID)
    tl.store(record, outside)
    tl.store(record + 1, _moved(rest + tokens + row, gap, below_M, scale))
    tl.store(record + 2, inside)
    tl.store(record + 3, tl.sum(tl.exp2(below_K * scale), 0))
    if AT_ONE:
        tl.store(record + 4, _moved(rest + 2 * tokens + row, gap, below_M, IN_LOG2))
        tl.store(record + 5, tl.sum(tl.exp2(below_K * IN_LOG2), 0))
    if SAID:
        record += 4 + 2 * AT_ONE
        label = tl.load(labels + row) - start
        here = (label >= 0) & (label < width)
        label_logit = tl.load(logits + label * column_stride, mask=here).to(tl.float32)
        best = tl.min(tl.where(some_K & (x_K == inside), column_K, NONE), 0)
        tl.store(record, (start + tl.where(best == NONE, -1, best)).to(tl.float32))
        tl.store(record + 1, tl.where(here, label_logit, -INF))


@triton.jit
def _moved(sum_before, gap, below_M, scale):
    """A sum of exponentials under a maximum that is higher by -gap, with more of them."""
    return tl.load(sum_before) * tl.exp2(gap * scale) + tl.sum(tl.exp2(below_M * scale), 0)
