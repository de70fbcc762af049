"""`records` in Triton: a rank's record of a token in one launch, and the ranks' records as one inside another kernel.

Sizes: T tokens, K entries per token, R ranks, L lanes of a record, B tokens of a program.
"""

import triton
import triton.language as tl
from torch import Tensor

from megakd.kernels.rows import Statistics
from megakd.kernels.triton.tiles import INF, finite, logaddexp, on_its_device, row_lanes


@on_its_device
def build_record(stats: Statistics, logprobs_TK: Tensor, temperature: float, *, sampled: bool = False) -> Tensor:
    """See `records.build_record`."""
    (tokens, top_k), at_one = logprobs_TK.shape, temperature != 1
    record_TL = logprobs_TK.new_empty((tokens, 8 + 2 * at_one))
    if tokens:
        _build_record[tokens,](
            stats.max_T, stats.sum_T, stats.sum_at_one_T, stats.label_logit_T.contiguous(),
            stats.entry_logits_TK.contiguous(), logprobs_TK.contiguous(), record_TL, top_k, 1 / temperature,
            SAMPLED=sampled, AT_ONE=at_one, **row_lanes(top_k),
        )  # fmt: skip
    return record_TL


@triton.jit
def _build_record(
    max_, sum_, sum_at_one, label_logit, entry_logits, logprobs, record, entries, inverse_temperature,
    SAMPLED: tl.constexpr, AT_ONE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K)
    x_K = tl.load(entry_logits + row * entries + k, mask=k < entries, other=-INF)
    logprob_K = tl.load(logprobs + row * entries + k, mask=k < entries, other=-INF)
    top = tl.max(x_K, 0)
    gap_K = x_K - finite(top)
    above_K = gap_K * inverse_temperature
    e_K, p_K = tl.exp(above_K), tl.exp(logprob_K)
    cross_K = p_K * ((0.0 if SAMPLED else logprob_K) - above_K)
    drift_K = e_K * (above_K - logprob_K)
    record += row * (10 if AT_ONE else 8)
    tl.store(record, tl.load(max_ + row))
    tl.store(record + 1, tl.load(sum_ + row))
    tl.store(record + 2, top)
    tl.store(record + 3, tl.sum(e_K, 0))
    tl.store(record + 4, tl.sum(tl.where(p_K > 0, cross_K, 0.0), 0))
    tl.store(record + 5, tl.sum(tl.where(e_K > 0, drift_K, 0.0), 0))
    tl.store(record + 6, tl.sum(p_K, 0))
    tl.store(record + 7, tl.load(label_logit + row))
    if AT_ONE:
        tl.store(record + 8, tl.load(sum_at_one + row))
        tl.store(record + 9, tl.sum(tl.exp(gap_K), 0))


@triton.jit
def merge(records, ranks, tokens, some, temperature, AT_ONE: tl.constexpr, L: tl.constexpr, B: tl.constexpr):
    """`records.merge_records` up to its logarithms, float64: the three maxima (-inf for none) and the sums."""
    temperature = tl.cast(temperature, tl.float64)
    outside_max, entry_max, label_logit = maxima(records, ranks, tokens, some, L, B)
    outside_sum = tl.zeros((B,), tl.float64)
    entry_sum, cross, drift, mass = outside_sum, outside_sum, outside_sum, outside_sum
    outside_at_one, entry_at_one = outside_sum, outside_sum
    for rank in range(ranks):
        outside_gap = lane(records, rank, tokens, 0, some, L) - finite(outside_max)
        entry_gap = lane(records, rank, tokens, 2, some, L) - finite(entry_max)
        entry_scale = tl.exp(entry_gap / temperature)
        gap = finite(entry_gap / temperature)
        entry_r, mass_r = lane(records, rank, tokens, 3, some, L), lane(records, rank, tokens, 6, some, L)
        outside_sum += lane(records, rank, tokens, 1, some, L) * tl.exp(outside_gap / temperature)
        entry_sum += entry_r * entry_scale
        cross += lane(records, rank, tokens, 4, some, L) - mass_r * gap
        drift += (lane(records, rank, tokens, 5, some, L) + entry_r * gap) * entry_scale
        mass += mass_r
        if AT_ONE:
            outside_at_one += lane(records, rank, tokens, 8, some, L) * tl.exp(outside_gap)
            entry_at_one += lane(records, rank, tokens, 9, some, L) * tl.exp(entry_gap)
    if not AT_ONE:
        outside_at_one, entry_at_one = outside_sum, entry_sum
    tops, masses = (outside_max, entry_max, label_logit), (outside_sum, entry_sum, mass)
    return tops, masses, (cross, drift), (outside_at_one, entry_at_one)


@triton.jit
def log_masses(outside_max, outside_sum, entry_max, entry_sum, top, temperature):
    """Log of the masses outside and in S, relative to e^(top / temperature); and of their sum."""
    temperature = tl.cast(temperature, tl.float64)
    outside = tl.log(outside_sum) + (outside_max - top) / temperature
    entry = tl.log(entry_sum) + (entry_max - top) / temperature
    return outside, entry, logaddexp(outside, entry)


@triton.jit
def maxima(records, ranks, tokens, some, L: tl.constexpr, B: tl.constexpr):
    """Over all ranks, float64: the largest logit outside S, the largest in S, and the label's."""
    outside_max = tl.full((B,), -INF, tl.float64)
    entry_max, label_logit = outside_max, outside_max
    for rank in range(ranks):
        outside_max = tl.maximum(outside_max, lane(records, rank, tokens, 0, some, L))
        entry_max = tl.maximum(entry_max, lane(records, rank, tokens, 2, some, L))
        label_logit = tl.maximum(label_logit, lane(records, rank, tokens, 7, some, L))
    return outside_max, entry_max, label_logit


@triton.jit
def lane(records, rank, tokens, lane, some, L: tl.constexpr):
    return tl.load(records + tl.cast(rank, tl.int64) * tokens * L + lane, mask=some, other=0.0).to(tl.float64)
