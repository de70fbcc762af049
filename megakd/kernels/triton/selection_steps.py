"""The steps of `megakd.kernels.selection_steps` in Triton, a launch each: the same functions, signatures and results.

Sizes: T tokens, K entries per token, R ranks, L values sent by a rank, or lanes of its record; N of all ranks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.predictions import Predictions
from megakd.kernels.selection_steps import Normalized
from megakd.kernels.triton.records import lane
from megakd.kernels.triton.slots import ordered
from megakd.kernels.triton.tiles import INF, finite, logaddexp, on_its_device, row_lanes


@on_its_device
def share(values_RTL: Tensor, top_k: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `selection_steps.share`."""
    ranks, tokens, sent = values_RTL.shape
    threshold_T = values_RTL.new_empty(tokens, dtype=torch.float32)
    ties_T, fine_T = threshold_T.new_empty(tokens, dtype=torch.int64), threshold_T.new_empty(tokens, dtype=torch.bool)
    if tokens:
        power = triton.next_power_of_2(ranks * sent)
        _share[tokens,](
            values_RTL, threshold_T, ties_T, fine_T, tokens, ranks * sent, sent, rank, top_k, N=power,
            num_warps=max(1, min(8, power // 256)),
        )  # fmt: skip
    return threshold_T, ties_T, fine_T


@triton.jit
def _share(values, thresholds, ties, fine, tokens, all_sent, sent, rank, top_k, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    of_N, here_N = n // sent, n < all_sent
    x_N = tl.load(values + (of_N.to(tl.int64) * tokens + row) * sent + n % sent, mask=here_N, other=-INF).to(tl.float32)
    order_N = ordered(x_N)
    low, high = -tl.max(-order_N, 0).to(tl.int64), tl.max(order_N, 0).to(tl.int64) + 1
    reached = all_sent
    while (reached != top_k) & (high - low > 1):  # top_k values reach low, or more do; fewer reach high
        middle = (low + high) >> 1
        count = tl.sum((here_N & (order_N >= middle.to(tl.int32))).to(tl.int32), 0)
        fits = count >= top_k
        low, high = tl.where(fits, middle, low), tl.where(fits, high, middle)
        reached = tl.where(fits, count, reached)
    threshold = tl.min(tl.where(here_N & (order_N >= low.to(tl.int32)), x_N, INF), 0)
    equal_N = here_N & (x_N == threshold)
    missing = top_k - tl.sum((x_N > threshold).to(tl.int32), 0) - tl.sum((equal_N & (of_N < rank)).to(tl.int32), 0)
    mine = tl.sum((equal_N & (of_N == rank)).to(tl.int32), 0)
    tl.store(thresholds + row, threshold)
    tl.store(ties + row, tl.maximum(tl.minimum(missing, mine), 0).to(tl.int64))
    tl.store(fine + row, tl.sum((x_N != x_N).to(tl.int32), 0) == 0)


@on_its_device
def normalize(entry_logits_TK: Tensor, records_RTL: Tensor, labels_T: Tensor | None, temperature: float) -> Normalized:
    """See `selection_steps.normalize`."""
    (ranks, tokens, lanes), top_k = records_RTL.shape, entry_logits_TK.shape[1]
    logprobs_TK, log_tail_T = torch.empty_like(entry_logits_TK), records_RTL.new_empty(tokens)
    said = None
    if labels_T is not None:
        said = Predictions(torch.empty_like(labels_T), torch.empty_like(log_tail_T), torch.empty_like(log_tail_T))
    if tokens:
        outputs = (None, None, None) if said is None else (said.id_T, said.logprob_T, said.label_logprob_T)
        _normalize[tokens,](
            entry_logits_TK, records_RTL, labels_T, logprobs_TK, log_tail_T, *outputs, tokens, ranks, top_k,
            temperature, SAID=said is not None, L=lanes, **row_lanes(top_k),
        )  # fmt: skip
    return Normalized(logprobs_TK, log_tail_T, said)


@triton.jit
def _normalize(
    entry_logits, records, labels, logprobs, log_tails, best_out, logprob_out, label_out, tokens, ranks, entries,
    temperature, SAID: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    records += t * L
    some = t < tokens
    inverse = 1 / tl.cast(temperature, tl.float64)
    outside_max = tl.full((1,), -INF, tl.float64)
    top, label_logit, best = outside_max, outside_max, tl.full((1,), INF, tl.float64)
    for rank in range(ranks):
        outside_max = tl.maximum(outside_max, lane(records, rank, tokens, 0, some, L))
        top = tl.maximum(top, lane(records, rank, tokens, 2, some, L))
        if SAID:
            label_logit = tl.maximum(label_logit, lane(records, rank, tokens, L - 1, some, L))
    outside, entry = tl.zeros((1,), tl.float64), tl.zeros((1,), tl.float64)
    outside_at_one, entry_at_one = outside, outside
    for rank in range(ranks):
        outside_gap = lane(records, rank, tokens, 0, some, L) - finite(outside_max)
        entry_max = lane(records, rank, tokens, 2, some, L)
        outside += lane(records, rank, tokens, 1, some, L) * tl.exp(outside_gap * inverse)
        entry += lane(records, rank, tokens, 3, some, L) * tl.exp((entry_max - top) * inverse)
        if L == 8:
            outside_at_one += lane(records, rank, tokens, 4, some, L) * tl.exp(outside_gap)
            entry_at_one += lane(records, rank, tokens, 5, some, L) * tl.exp(entry_max - top)
        if SAID:
            best_here = lane(records, rank, tokens, L - 2, some, L)
            best = tl.where(entry_max >= top, tl.minimum(best, best_here), best)
    log_outside = tl.log(outside) + (outside_max - top) * inverse
    log_all = logaddexp(log_outside, tl.log(entry))
    tl.store(log_tails + t, (log_outside - log_all).to(tl.float32))
    k = tl.arange(0, K)
    x_K = tl.load(entry_logits + t * entries + k, mask=k < entries, other=-INF)
    logprob_K = (x_K - top.to(tl.float32)) / temperature - log_all.to(tl.float32)
    tl.store(logprobs + t * entries + k, logprob_K, mask=k < entries)
    if SAID:
        log_all_at_one = log_all
        if L == 8:
            log_all_at_one = logaddexp(tl.log(outside_at_one) + (outside_max - top), tl.log(entry_at_one))
        label_logprob = tl.where(tl.load(labels + t) >= 0, label_logit - top - log_all_at_one, 0.0)
        tl.store(best_out + t, best.to(tl.int64))
        tl.store(logprob_out + t, (-log_all_at_one).to(tl.float32))
        tl.store(label_out + t, label_logprob.to(tl.float32))
