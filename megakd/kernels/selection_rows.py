"""The passes of select_top_k over this rank's rows, in plain PyTorch; triton_selection offers the same functions.

    scan_rows      reads the logits once, in chunks of columns; the chunks with the largest maxima hold the K largest
                   logits, and only they are looked at again
    take_entries   picks the entries, when the ranks have agreed on a threshold, by comparing with it, never by the
                   order in which topk left ties; a row with so many ties that some may lie in a chunk that was not
                   looked at is scanned whole

Sizes: T tokens, K entries per token, W columns, C chunks of columns, L values sent by a rank, S chunks looked at, N
columns in them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.paths import row_passes
from megakd.kernels.rows import finite
from megakd.kernels.vocab import VocabShard

BLOCK_TOKENS = {"cpu": 32, "cuda": 4096}  # rows whose chunks and candidates are in memory at a time


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


def take_entries(
    logits_TW: Tensor, scan: Scan, threshold_T: Tensor, ties_T: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """This rank's columns above the threshold and the first `ties_T` of those equal to it; and its record.

    Returns:
        columns_TK: ascending, then -1; int64.
        record_T4: max outside the entries, sum outside of exp((x - max) / temperature), and both inside; float32.
    """
    columns_TK = torch.full((len(logits_TW), top_k), -1, device=logits_TW.device)
    record_T4 = torch.stack([scan.rest_max_T, scan.rest_sum_T], 1).repeat(1, 2)
    crowded_T = (scan.rest_max_T >= threshold_T.float()) & (ties_T > 0)
    for block in blocks(logits_TW):
        columns_TN, x_TN = candidates(logits_TW[block], scan.chunks_TS[block], scan.chunks)
        _take(columns_TN, x_TN, threshold_T[block], ties_T[block], columns_TK[block], record_T4[block], temperature)
    retake_rows(crowded_T.nonzero()[:, 0], logits_TW, threshold_T, ties_T, columns_TK, record_T4, temperature)
    return columns_TK, record_T4


def retake_rows(
    rows: Tensor,
    logits_TW: Tensor,
    threshold_T: Tensor,
    ties_T: Tensor,
    columns_TK: Tensor,
    record_T4: Tensor,
    temperature: float,
) -> None:
    """Writes the entries and record of some rows anew, from all of their logits."""
    width = logits_TW.shape[1]
    for row in rows.split(32) if len(rows) else ():
        part_TK, part_T4 = columns_TK[row].fill_(-1), record_T4[row].fill_(-torch.inf)
        x_TW, columns_TW = logits_TW[row].float(), torch.arange(width, device=row.device).expand(len(row), width)
        part_T4[:, 1] = 0
        _take(columns_TW, x_TW, threshold_T[row], ties_T[row], part_TK, part_T4, temperature)
        columns_TK[row], record_T4[row] = part_TK, part_T4


def _take(columns_TN, x_TN, threshold_T, ties_T, columns_TK, record_T4, temperature):
    """Fills in columns and record, which comes with max and sum of the columns that are not among the N."""
    threshold_T1 = threshold_T[:, None].float()
    kept_TN = x_TN > threshold_T1
    tie_row, tie = (x_TN == threshold_T1).nonzero().unbind(1)
    fits = place_within(tie_row, len(x_TN)) < ties_T[tie_row]
    kept_TN[tie_row[fits], tie[fits]] = True
    row, place = kept_TN.nonzero().unbind(1)
    slot = place_within(row, len(x_TN))
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


def place_within(row: Tensor, rows: int) -> Tensor:
    """Place of each element within its row, when elements are listed row by row."""
    count = torch.bincount(row, minlength=rows)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
