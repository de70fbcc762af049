"""select_top_k: the teacher's K most likely tokens over a sharded vocabulary, and the mass of all others.

1. `rows.summarize` reads this rank's logits once and gives the maximum and the sum of exponentials of each chunk of
   columns. The chunks with the largest maxima hold the K largest logits; only they are looked at again.
2. Each rank's min(K, W) largest logits, in their own dtype, are all-gathered: values alone, no ids.
3. The K-th largest of them is the threshold of the row. Everything above it is kept. Ties at the threshold (the normal
   case in bfloat16) are shared out by ascending id: the gathered values tell how many the ranks before this one hold.
4. Each rank finds its entries by comparing with the threshold, never by the order in which topk left ties. A row with
   so many ties that some may lie in a chunk that was not looked at is scanned whole.
5. log-sum-exp inside and outside the entries, each summed directly, go round in one more record of four floats.

Sizes: T tokens, K entries per token, W vocabulary columns on this rank, R ranks, C chunks of columns, L values sent by
a rank, S chunks looked at, N columns in them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.paths import row_passes
from megakd.kernels.rows import finite
from megakd.kernels.vocab import VocabShard
from megakd.targets import TeacherTargets

BLOCK_TOKENS = {"cpu": 32, "cuda": 4096}  # rows whose chunks and candidates are in memory at a time


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
    scan = scan_rows(logits_TW, top_k, shard, temperature)
    values_RTL = shard.all_gather(scan.values_TL)
    check_finite(values_RTL)
    threshold_T, ties_T = share(values_RTL, top_k, shard.rank)
    columns_TK, record_T4 = take_entries(
        logits_TW[:, : shard.real_width], scan, threshold_T, ties_T, top_k, temperature
    )
    logprobs_TK, log_tail_T = normalize(logits_TW, columns_TK, shard.all_gather(record_T4), temperature)
    ids_TK = torch.where(columns_TK >= 0, columns_TK + shard.start, -1)
    if gather and shard.ranks > 1:
        ids_TK, logprobs_TK = gather_entries(ids_TK, logprobs_TK, shard)
    return TeacherTargets(ids_TK, logprobs_TK, log_tail_T, temperature)


class Scan(NamedTuple):
    """What is known of this rank's rows before the ranks have spoken.

    values_TL: the largest logits in their own dtype, padded with -inf; L is the same on every rank.
    chunks_TS: the chunks with the largest maxima, ascending; chunk c holds the columns j with j % chunks == c.
    rest_max_T, rest_sum_T: largest logit of the other chunks, -inf for none; their sum of exp((x - max) / temperature).
    """

    values_TL: Tensor
    chunks_TS: Tensor
    rest_max_T: Tensor
    rest_sum_T: Tensor
    chunks: int


def scan_rows(logits_TW: Tensor, top_k: int, shard: VocabShard, temperature: float) -> Scan:
    """The one read of all logits, and the largest values."""
    tokens, width = len(logits_TW), shard.real_width
    sent = min(top_k, max(logits_TW.shape[1], -(-shard.size // shard.ranks)))
    logits_TW = logits_TW[:, :width]
    looked_at = top_k + top_k // 2 + 16  # more than K, or every tie at the threshold would mean a whole scan
    height = 2 ** max(0, round(math.log2(max(1, width) / looked_at) / 2))  # as many chunks as columns in those
    chunks = -(-width // height)
    looked_at = min(chunks, looked_at)
    values_TL = logits_TW.new_full((tokens, sent), -torch.inf)
    chunks_TS = values_TL.new_zeros((tokens, looked_at), dtype=torch.int64)
    rest_max_T = values_TL.new_full((tokens,), -torch.inf, dtype=torch.float32)
    rest_sum_T = torch.zeros_like(rest_max_T)
    for block in blocks(logits_TW):
        max_TC, sum_TC = row_passes(logits_TW).summarize(logits_TW[block], width, chunks, temperature)
        chunks_TS[block] = max_TC.topk(looked_at, 1, sorted=False).indices.sort(1).values
        broken_T = max_TC[:, 0].isnan()
        max_TC.scatter_(1, chunks_TS[block], -torch.inf)
        rest_max_T[block] = top_T = max_TC.amax(1)
        rest_sum_T[block] = (sum_TC * ((max_TC - finite(top_T)[:, None]) / temperature).exp()).sum(1)
        _, x_TN = candidates(logits_TW[block], chunks_TS[block], chunks)
        taken = min(sent, width)
        values_TL[block, :taken] = x_TN.topk(taken, 1, sorted=False).values.masked_fill(broken_T[:, None], torch.nan)
    return Scan(values_TL, chunks_TS, rest_max_T, rest_sum_T, chunks)


def blocks(logits_TW: Tensor) -> list[slice]:
    """The rows, a block at a time; none where there are no columns."""
    size = BLOCK_TOKENS[logits_TW.device.type]
    return [slice(first, first + size) for first in range(0, len(logits_TW) if logits_TW.shape[1] else 0, size)]


def candidates(logits_TW: Tensor, chunks_TS: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """The columns of some chunks, ascending, and their logits in float32; -inf for columns that do not exist."""
    width = logits_TW.shape[1]
    steps = torch.arange(0, width, chunks, device=chunks_TS.device)
    columns_TN = (steps[:, None] + chunks_TS[:, None]).flatten(1)
    if chunks * len(steps) == width:
        return columns_TN, logits_TW.gather(1, columns_TN).float()
    x_TN = logits_TW.gather(1, columns_TN.clamp(max=width - 1)).float()
    return columns_TN, x_TN.masked_fill_(columns_TN >= width, -torch.inf)


def check_finite(values_RTL: Tensor) -> None:
    """Raises ValueError, on every rank alike, where a rank has marked a row as broken."""
    broken_T = values_RTL.isnan().any(2).any(0)
    if broken_T.any():
        raise ValueError(
            f"the teacher's logits hold NaN or infinity in {int(broken_T.sum())} of {len(broken_T)} rows, first in row "
            f"{int(broken_T.nonzero()[0])}"
        )


def share(values_RTL: Tensor, top_k: int, rank: int) -> tuple[Tensor, Tensor]:
    """The K-th largest value of each row, and how many of the logits equal to it this rank is to keep.

    A rank's list may be too short for all its ties, but then it holds as many as the row still needs.
    """
    values_TRL = values_RTL.transpose(0, 1)
    threshold_T = values_TRL.flatten(1).topk(top_k, 1, sorted=False).values.amin(1)
    above_TR = (values_TRL > threshold_T[:, None, None]).sum(2)
    equal_TR = (values_TRL == threshold_T[:, None, None]).sum(2)
    missing_T = top_k - above_TR.sum(1) - equal_TR[:, :rank].sum(1)
    return threshold_T, torch.minimum(missing_T, equal_TR[:, rank]).clamp(min=0)


def take_entries(
    logits_TW: Tensor, scan: Scan, threshold_T: Tensor, ties_T: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """This rank's columns above the threshold and the first `ties_T` of those equal to it; and its record.

    Returns:
        columns_TK: ascending, then -1; int64.
        record_T4: max outside the entries, sum outside of exp((x - max) / temperature), and both inside; float32.
    """
    tokens, width = logits_TW.shape
    columns_TK = torch.full((tokens, top_k), -1, device=logits_TW.device)
    record_T4 = torch.stack([scan.rest_max_T, scan.rest_sum_T], 1).repeat(1, 2)
    crowded_T = (scan.rest_max_T >= threshold_T.float()) & (ties_T > 0)
    for block in blocks(logits_TW):
        columns_TN, x_TN = candidates(logits_TW[block], scan.chunks_TS[block], scan.chunks)
        _take(columns_TN, x_TN, threshold_T[block], ties_T[block], columns_TK[block], record_T4[block], temperature)
    crowded = crowded_T.nonzero()[:, 0]
    for row in crowded.split(32) if len(crowded) else ():
        part_TK, part_T4 = columns_TK[row].fill_(-1), record_T4[row].fill_(-torch.inf)
        x_TW, columns_TW = logits_TW[row].float(), torch.arange(width, device=row.device).expand(len(row), width)
        part_T4[:, 1] = 0
        _take(columns_TW, x_TW, threshold_T[row], ties_T[row], part_TK, part_T4, temperature)
        columns_TK[row], record_T4[row] = part_TK, part_T4
    return columns_TK, record_T4


def _take(columns_TN, x_TN, threshold_T, ties_T, columns_TK, record_T4, temperature):
    """Fills in columns and record, which comes with max and sum of the columns that are not among the N."""
    threshold_T1 = threshold_T[:, None].float()
    kept_TN = x_TN > threshold_T1
    tie_row, tie = (x_TN == threshold_T1).nonzero().unbind(1)
    fits = _place(tie_row, len(x_TN)) < ties_T[tie_row]
    kept_TN[tie_row[fits], tie[fits]] = True
    row, place = kept_TN.nonzero().unbind(1)
    slot = _place(row, len(x_TN))
    columns_TK[row, slot] = columns_TN[row, place]
    entries_TK = x_TN.new_full(columns_TK.shape, -torch.inf)
    entries_TK[row, slot] = x_TN[row, place]
    rest_max_T, rest_sum_T = record_T4[:, 0].clone(), record_T4[:, 1].clone()
    x_TN.masked_fill_(kept_TN, -torch.inf)
    record_T4[:, 0] = torch.maximum(x_TN.amax(1), rest_max_T)
    record_T4[:, 2] = entries_TK.amax(1)
    outside_T1, inside_T1 = finite(record_T4[:, 0:1]), finite(record_T4[:, 2:3])
    record_T4[:, 1] = rest_sum_T * ((rest_max_T - outside_T1[:, 0]) / temperature).exp()
    record_T4[:, 1] += x_TN.sub_(outside_T1).mul_(1 / temperature).exp_().sum(1)
    record_T4[:, 3] = ((entries_TK - inside_T1) / temperature).exp().sum(1)


def _place(row: Tensor, rows: int) -> Tensor:
    """Place of each element within its row, when elements are listed row by row."""
    count = torch.bincount(row, minlength=rows)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]


def normalize(logits_TW: Tensor, columns_TK: Tensor, records_RT4: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of this rank's entries, and the log mass outside everyone's; float32."""
    outside_max_RT, outside_sum_RT, entry_max_RT, entry_sum_RT = records_RT4.double().unbind(2)
    top_T = entry_max_RT.amax(0)  # of all logits: the entries are the largest
    log_outside_T = (outside_sum_RT.log() + (outside_max_RT - top_T) / temperature).logsumexp(0)
    log_entries_T = (entry_sum_RT.log() + (entry_max_RT - top_T) / temperature).logsumexp(0)
    log_all_T = torch.logaddexp(log_outside_T, log_entries_T)
    used_TK = columns_TK >= 0
    if logits_TW.shape[1]:
        entries_TK = logits_TW.gather(1, columns_TK.clamp(min=0)).float()
    else:
        entries_TK = torch.zeros_like(columns_TK, dtype=torch.float32)
    logprobs_TK = (entries_TK - top_T[:, None].float()) / temperature - log_all_T[:, None].float()
    return logprobs_TK.where(used_TK, -torch.inf), (log_outside_T - log_all_T).float()


def gather_entries(ids_TK: Tensor, logprobs_TK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """All entries of a row on every rank, at most K, ascending from rank to rank; empty slots last."""
    ids_TRK, logprobs_TRK = (shard.all_gather(x).transpose(0, 1).flatten(1) for x in (ids_TK, logprobs_TK))
    row, place = (ids_TRK >= 0).nonzero().unbind(1)
    slot = _place(row, len(ids_TK))
    ids_TK, logprobs_TK = torch.full_like(ids_TK, -1), torch.full_like(logprobs_TK, -torch.inf)
    ids_TK[row, slot], logprobs_TK[row, slot] = ids_TRK[row, place], logprobs_TRK[row, place]
    return ids_TK, logprobs_TK
