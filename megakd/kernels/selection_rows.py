"""The passes of select_top_k over this rank's rows, in plain PyTorch; triton.selection_rows offers the same functions.

    scan_rows      reads the logits once, in chunks of columns. The K chunks with the largest maxima hold at least K
                   logits that reach the least of these: they, hardly more than K, are the candidates, and everything
                   else is summed up
    take_entries   picks the entries among the candidates, when the ranks have agreed on a threshold, by comparing with
                   it, never by the order in which topk left ties; a row with more ties than there is room for
                   candidates is scanned whole

Sizes: T tokens, K entries per token, W columns, C chunks of columns, L values sent by a rank, S chunks looked at, M
candidates at most.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.paths import row_passes
from megakd.kernels.rows import DEVICE_BLOCK_BYTES, finite
from megakd.kernels.vocab import VocabShard

BLOCK_TOKENS = {"cpu": 64, "cuda": 4096}  # rows whose chunks are in memory at a time


class Scan(NamedTuple):
    """What is known of this rank's rows before the ranks have spoken.

    values_TL: the largest logits in their own dtype, padded with -inf; L is the same on every rank.
    columns_TM, x_TM: the candidates, ascending, and their logits, float32; -1 and -inf in empty slots.
    rest_max_T, rest_sum_T: of the other columns, largest logit, -inf for none, and sum of exp((x - max) / temperature).
    overfull_T: whether there were more candidates than M.
    """

    values_TL: Tensor
    columns_TM: Tensor
    x_TM: Tensor
    rest_max_T: Tensor
    rest_sum_T: Tensor
    overfull_T: Tensor


def scan_rows(logits_TW: Tensor, top_k: int, shard: VocabShard, temperature: float) -> Scan:
    """The one read of all logits, and the largest values."""
    tokens, width = len(logits_TW), shard.real_width
    sent = min(top_k, max(logits_TW.shape[1], -(-shard.size // shard.ranks)))
    logits_TW = logits_TW[:, :width]
    room = top_k + top_k // 2 + 16  # for ties, and for columns that share a chunk with a larger one
    height = 2 ** max(0, round(math.log2(max(1, width) / room) / 2))  # as many chunks as columns in those looked at
    chunks = -(-width // height)
    values_TL = logits_TW.new_full((tokens, sent), -torch.inf)
    columns_TM = torch.full((tokens, min(room, width)), -1, device=logits_TW.device)
    x_TM = columns_TM.new_full(columns_TM.shape, -torch.inf, dtype=torch.float32)
    rest_2T = x_TM.new_zeros((2, tokens))
    overfull_T = torch.zeros_like(rest_2T[0], dtype=torch.bool)
    for block in blocks(logits_TW):
        max_TC, sum_TC = row_passes(logits_TW).summarize(logits_TW[block], width, chunks, temperature)
        bound_T1, chunks_TS = _largest_chunks(max_TC, top_k, room)
        x_TN = gather_chunks(logits_TW[block], chunks_TS, chunks).flatten(1)
        reached_TN = x_TN >= bound_T1
        row, place = reached_TN.nonzero().unbind(1)
        slot = place_within(row, len(x_TN))
        fits = slot < columns_TM.shape[1]
        overfull_T[block][row[~fits]] = True
        row, place, slot = row[fits], place[fits], slot[fits]
        looked_at = chunks_TS.shape[1]
        columns_TM[block][row, slot] = place // looked_at * chunks + chunks_TS[row, place % looked_at]
        x_TM[block][row, slot] = x_TN[row, place]
        taken = min(sent, width)
        values_T = x_TM[block].topk(taken, 1, sorted=False).values
        if overfull_T[block].any():
            values_T = x_TN.topk(taken, 1, sorted=False).values.where(overfull_T[block, None], values_T)
        values_TL[block, :taken] = values_T.masked_fill(bound_T1.isnan(), torch.nan)
        rest_2T[:, block] = _rest(max_TC.scatter_(1, chunks_TS, -torch.inf), sum_TC, x_TN, reached_TN, temperature)
    return Scan(values_TL, columns_TM, x_TM, *rest_2T, overfull_T)


def _largest_chunks(max_TC: Tensor, top_k: int, room: int) -> tuple[Tensor, Tensor]:
    """The bound that the K-th largest chunk reaches [T, 1], NaN in broken rows; and the chunks that reach it.

    The chunks are ascending, as many as in the row that has most of them, and no more than there is room for.
    """
    values_TS, chunks_TS = max_TC.topk(min(room, max_TC.shape[1]), 1)
    bound_T1 = values_TS[:, top_k - 1 : top_k] if values_TS.shape[1] >= top_k else values_TS[:, -1:]
    reaching = max(1, int((values_TS >= bound_T1).sum(1).max()))
    return bound_T1, chunks_TS[:, :reaching].sort(1).values


def _rest(max_TC: Tensor, sum_TC: Tensor, x_TN: Tensor, reached_TN: Tensor, temperature: float) -> Tensor:
    """Max and sum of what is no candidate: chunks not looked at (the others' max is -inf), columns below the bound."""
    x_TN = x_TN.masked_fill_(reached_TN, -torch.inf)
    top_T = torch.maximum(max_TC.amax(1), x_TN.amax(1))
    base_T1 = finite(top_T)[:, None]
    sum_T = (max_TC.sub_(base_T1).mul_(1 / temperature).exp_().mul_(sum_TC)).sum(1)
    return torch.stack([top_T, sum_T + x_TN.sub_(base_T1).mul_(1 / temperature).exp_().sum(1)])


def blocks(logits_TW: Tensor, row_bytes: int = 1) -> list[slice]:
    """The rows, a block at a time; none where there are no columns. `row_bytes` is what a row of a block takes."""
    size = max(1, min(BLOCK_TOKENS[logits_TW.device.type], DEVICE_BLOCK_BYTES // row_bytes))
    return [slice(first, first + size) for first in range(0, len(logits_TW) if logits_TW.shape[1] else 0, size)]


def gather_chunks(logits_TW: Tensor, chunks_TS: Tensor, chunks: int) -> Tensor:
    """The logits of some chunks [T, height, S], float32; -inf for columns that do not exist."""
    whole, left = divmod(logits_TW.shape[1], chunks)
    index = chunks_TS[:, None].expand(-1, whole, -1)
    x = logits_TW[:, : whole * chunks].unflatten(1, (whole, chunks)).gather(2, index).float()
    if not left:
        return x
    last = logits_TW[:, whole * chunks :].gather(1, chunks_TS.clamp(max=left - 1)).float()
    return torch.cat([x, last.masked_fill_(chunks_TS >= left, -torch.inf)[:, None]], 1)


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
    crowded_T = scan.overfull_T | (scan.rest_max_T >= threshold_T.float()) & (ties_T > 0)
    for block in blocks(logits_TW):
        candidates = scan.columns_TM[block], scan.x_TM[block]
        _take(*candidates, threshold_T[block], ties_T[block], columns_TK[block], record_T4[block], temperature)
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


def _take(columns_TM, x_TM, threshold_T, ties_T, columns_TK, record_T4, temperature):
    """Fills in columns and record, which comes with max and sum of the columns that are not among the M."""
    threshold_T1 = threshold_T[:, None].float()
    kept_TM = x_TM > threshold_T1
    tie_row, tie = (x_TM == threshold_T1).nonzero().unbind(1)
    fits = place_within(tie_row, len(x_TM)) < ties_T[tie_row]
    kept_TM[tie_row[fits], tie[fits]] = True
    row, place = kept_TM.nonzero().unbind(1)
    slot = place_within(row, len(x_TM))
    columns_TK[row, slot] = columns_TM[row, place]
    entries_TK = x_TM.new_full(columns_TK.shape, -torch.inf)
    entries_TK[row, slot] = x_TM[row, place]
    rest_max_T, rest_sum_T = record_T4[:, 0].clone(), record_T4[:, 1].clone()
    x_TM.masked_fill_(kept_TM, -torch.inf)
    record_T4[:, 0] = torch.maximum(x_TM.amax(1), rest_max_T)
    record_T4[:, 2] = entries_TK.amax(1)
    outside_T1, inside_T1 = finite(record_T4[:, 0:1]), finite(record_T4[:, 2:3])
    record_T4[:, 1] = rest_sum_T * ((rest_max_T - outside_T1[:, 0]) / temperature).exp()
    record_T4[:, 1] += x_TM.sub_(outside_T1).mul_(1 / temperature).exp_().sum(1)
    record_T4[:, 3] = ((entries_TK - inside_T1) / temperature).exp().sum(1)


def place_within(row: Tensor, rows: int) -> Tensor:
    """Place of each element within its row, when elements are listed row by row."""
    count = torch.bincount(row, minlength=rows)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
