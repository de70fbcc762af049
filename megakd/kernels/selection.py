"""select_top_k: the teacher's K most likely tokens over a sharded vocabulary, and the mass of all others.

1. Each rank takes its own largest min(K, W) logits, in their own dtype; these values alone are all-gathered.
2. The K-th largest of them is the threshold of the row. Everything above it is kept. Ties at the threshold (the normal
   case in bfloat16) are shared out by ascending id: the gathered values tell how many the ranks before this one hold.
3. Each rank finds its entries by comparing its logits with the threshold, never by the order in which topk left ties.
4. log-sum-exp inside and outside the entries, each summed directly, go round in one more record of four floats.

Sizes: T tokens, K entries per token, W vocabulary columns on this rank, C values sent by a rank, R ranks.
"""

import torch
from torch import Tensor

from megakd.kernels.records import finite
from megakd.kernels.rows import row_blocks
from megakd.kernels.vocab import VocabShard
from megakd.targets import TeacherTargets

PICK_ROWS = 64  # rows whose entries are looked for at a time


@torch.no_grad()
def select_top_k(
    logits_TW: Tensor, top_k: int, shard: VocabShard, temperature: float = 1.0, *, gather: bool = False
) -> TeacherTargets:
    """The K largest teacher logits of each row, as log-probabilities under the full softmax at `temperature`.

    Equal logits are taken by ascending id, so the entries are the same however the vocabulary is split.

    Args:
        logits_TW: the teacher's, float32, bfloat16 or float16, not divided by the temperature; columns beyond the real
            vocabulary are not read. Not modified.
        top_k: 1 <= K <= the real vocabulary.
        gather: give every rank all K entries; otherwise each keeps those of its own shard, and the other slots are
            empty (id -1, log-probability -inf).
    Returns:
        TeacherTargets with ids ascending within a row and empty slots last; log_tail_T is -inf when K is the whole
        vocabulary.
    Raises:
        ValueError: top_k out of range, shapes that do not fit, or a logit that is not finite (on every rank alike).
    Collectives: all-gather of min(K, W) values in the logits' dtype, and of 4 floats, per token and rank; with `gather`
        also K ids and K floats. W must not differ by more than rounding from rank to rank when it is below K.
    """
    shard.check_logits(logits_TW, "teacher logits")
    if not 1 <= top_k <= shard.size:
        raise ValueError(f"top_k must be between 1 and the vocabulary of {shard.size}, not {top_k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, not {temperature}")
    values_TC = local_top_values(logits_TW, top_k, shard)
    values_RTC = shard.all_gather(values_TC)
    check_finite(~(values_RTC < torch.inf).all(2).all(0), "NaN or +inf")
    threshold_T, ties_T = share(values_RTC, top_k, shard.rank)
    columns_TK = own_columns(logits_TW[:, : shard.real_width], threshold_T, ties_T, top_k)
    logprobs_TK, log_tail_T = log_probabilities(logits_TW, columns_TK, shard, temperature)
    ids_TK = torch.where(columns_TK >= 0, columns_TK + shard.start, -1)
    if gather and shard.ranks > 1:
        ids_TK, logprobs_TK = gather_entries(ids_TK, logprobs_TK, shard)
    return TeacherTargets(ids_TK, logprobs_TK, log_tail_T, temperature)


def local_top_values(logits_TW: Tensor, top_k: int, shard: VocabShard) -> Tensor:
    """The largest values of this rank's real columns [T, C], padded with -inf; C is the same on every rank."""
    count = min(top_k, max(logits_TW.shape[1], -(-shard.size // shard.ranks)))
    values_TC = logits_TW.new_full((len(logits_TW), count), -torch.inf)
    taken = min(count, shard.real_width)
    if taken:
        values_TC[:, :taken] = logits_TW[:, : shard.real_width].topk(taken, 1).values
    return values_TC


def check_finite(bad_T: Tensor, what: str) -> None:
    """Raises ValueError where a row is bad; the argument is the same on every rank."""
    if bad_T.any():
        raise ValueError(
            f"the teacher's logits hold {what} in {int(bad_T.sum())} of {len(bad_T)} rows, first in row "
            f"{int(bad_T.nonzero()[0])}"
        )


def share(values_RTC: Tensor, top_k: int, rank: int) -> tuple[Tensor, Tensor]:
    """The K-th largest value of each row, and how many of the logits equal to it this rank is to keep.

    A rank's list may be too short for all its ties, but then it holds as many as the row still needs.
    """
    values_TRC = values_RTC.transpose(0, 1)
    threshold_T = values_TRC.flatten(1).topk(top_k, 1).values.amin(1)
    above_TR = (values_TRC > threshold_T[:, None, None]).sum(2)
    equal_TR = (values_TRC == threshold_T[:, None, None]).sum(2)
    missing_T = top_k - above_TR.sum(1) - equal_TR[:, :rank].sum(1)
    return threshold_T, torch.minimum(missing_T, equal_TR[:, rank]).clamp(min=0)


def own_columns(logits_TW: Tensor, threshold_T: Tensor, ties_T: Tensor, top_k: int) -> Tensor:
    """Columns above the threshold and the first `ties_T` of those equal to it, ascending, then -1; int64 [T, K]."""
    columns_TK = threshold_T.new_full((len(logits_TW), top_k), -1, dtype=torch.int64)
    for first in range(0, len(logits_TW), PICK_ROWS):
        rows = slice(first, first + PICK_ROWS)
        kept = logits_TW[rows] > threshold_T[rows, None]
        tie_row, tie_column = (logits_TW[rows] == threshold_T[rows, None]).nonzero().unbind(1)
        fits = _place(tie_row, len(kept)) < ties_T[rows][tie_row]
        kept[tie_row[fits], tie_column[fits]] = True
        row, column = kept.nonzero().unbind(1)
        columns_TK[rows][row, _place(row, len(kept))] = column
    return columns_TK


def _place(row: Tensor, rows: int) -> Tensor:
    """Place of each element within its row, when elements are listed row by row."""
    count = torch.bincount(row, minlength=rows)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]


def log_probabilities(
    logits_TW: Tensor, columns_TK: Tensor, shard: VocabShard, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of this rank's entries and the log mass outside everyone's, at the temperature; float32."""
    tokens, width = len(logits_TW), shard.real_width
    outside_max_T = logits_TW.new_full((tokens,), -torch.inf, dtype=torch.float32)
    outside_sum_T = torch.zeros_like(outside_max_T)
    entries_TK = outside_max_T[:, None].repeat(1, columns_TK.shape[1])
    for rows, x, _ in row_blocks(logits_TW, torch.ones_like(outside_max_T, dtype=torch.bool), width):
        missing = x[:, :width].isneginf().any(1)
        columns = columns_TK[rows].where(columns_TK[rows] >= 0, width)
        entries_TK[rows] = x.gather(1, columns)
        x.scatter_(1, columns, -torch.inf)
        outside_max_T[rows] = top = x.amax(1)
        x -= finite(top)[:, None]
        outside_sum_T[rows] = x.mul_(1 / temperature).exp_().sum(1).masked_fill(missing, torch.nan)
    entry_max_T = entries_TK.amax(1)
    entry_sum_T = ((entries_TK - finite(entry_max_T)[:, None]) / temperature).exp().sum(1)
    record = torch.stack([outside_max_T, outside_sum_T, entry_max_T, entry_sum_T], 1)
    outside_max_RT, outside_sum_RT, entry_max_RT, entry_sum_RT = shard.all_gather(record).double().unbind(2)
    check_finite(outside_sum_RT.isnan().any(0), "-inf")
    top_T = entry_max_RT.amax(0)  # of all logits: the entries are the largest
    log_outside_T = (outside_sum_RT.log() + (outside_max_RT - top_T) / temperature).logsumexp(0)
    log_entries_T = (entry_sum_RT.log() + (entry_max_RT - top_T) / temperature).logsumexp(0)
    log_all_T = torch.logaddexp(log_outside_T, log_entries_T)
    logprobs_TK = (entries_TK - top_T[:, None].float()) / temperature - log_all_T[:, None].float()
    return logprobs_TK, (log_outside_T - log_all_T).float()


def gather_entries(ids_TK: Tensor, logprobs_TK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """All entries of a row on every rank; each row has exactly K of them, ascending from rank to rank."""
    tokens, top_k = ids_TK.shape
    ids_TRK, logprobs_TRK = (shard.all_gather(x).transpose(0, 1).flatten(1) for x in (ids_TK, logprobs_TK))
    used = ids_TRK >= 0
    return ids_TRK[used].view(tokens, top_k), logprobs_TRK[used].view(tokens, top_k)
