"""The passes of select_top_k over this rank's rows, in plain PyTorch; triton.selection_rows offers the same functions.

    scan_rows      reads the logits once, in chunks of columns. The K chunks with the largest maxima hold at least K
                   logits that reach the least of these: they, hardly more than K, are the candidates, and everything
                   else is summed up
    take_entries   picks the entries among the candidates, when the ranks have agreed on a threshold, by comparing with
                   it, never by the order in which topk left ties; a row with more ties than there is room for
                   candidates is scanned whole

Sizes: T tokens, K entries per token, W columns, C chunks of columns, L values sent by a rank or lanes of its record, S
chunks looked at, M candidates at most.
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
    rest_max_T: of the other columns the largest logit, -inf for none. rest_sums_XT: their sum of exp((x - max) /
        temperature), and, where it was asked for, that at temperature 1.
    overfull_T: whether there were more candidates than M.
    """

    values_TL: Tensor
    columns_TM: Tensor
    x_TM: Tensor
    rest_max_T: Tensor
    rest_sums_XT: Tensor
    overfull_T: Tensor


class Chosen(NamedTuple):
    """This rank's entries, and its record.

    ids_TK: ascending global ids, then -1; int64. entry_logits_TK: raw, -inf for none; float32.
    record_TL: max outside the entries, sum outside of exp((x - max) / temperature), and both inside; float32. With
        labels four lanes more: at a temperature other than 1 the two sums at 1 (otherwise neither); the id of the
        largest entry, the lowest among equals, and the label's logit, -inf where it is another rank's. An id is exact
        in float32 up to 2^24, which no vocabulary reaches.
    """

    ids_TK: Tensor
    entry_logits_TK: Tensor
    record_TL: Tensor


def scan_rows(logits_TW: Tensor, top_k: int, shard: VocabShard, temperature: float, *, at_one: bool = False) -> Scan:
    """The one read of all logits, and the largest values; NaN in a row that is not finite.

    Args:
        logits_TW: columns beyond the real vocabulary are not read.
        at_one: sum up at temperature 1 as well, which is another than `temperature`.
    """
    tokens, width = len(logits_TW), shard.real_width
    sent = min(top_k, max(logits_TW.shape[1], -(-shard.size // shard.ranks)))
    logits_TW = logits_TW[:, :width]
    room = top_k + top_k // 2 + 16  # for ties, and for columns that share a chunk with a larger one
    height = 2 ** max(0, round(math.log2(max(1, width) / room) / 2))  # as many chunks as columns in those looked at
    chunks = -(-width // height)
    values_TL = logits_TW.new_full((tokens, sent), -torch.inf)
    columns_TM = torch.full((tokens, min(room, width)), -1, device=logits_TW.device)
    x_TM = columns_TM.new_full(columns_TM.shape, -torch.inf, dtype=torch.float32)
    temperatures = (temperature, 1.0) if at_one else (temperature,)
    rest_XT = x_TM.new_zeros((1 + len(temperatures), tokens))
    overfull_T = torch.zeros_like(rest_XT[0], dtype=torch.bool)
    for block in blocks(logits_TW):
        summary = row_passes(logits_TW).summarize(logits_TW[block], width, chunks, temperature, at_one=at_one)
        max_TC, sums = summary.max_TC, [sum_TC for sum_TC in summary[1:3] if sum_TC is not None]
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
        max_TC.scatter_(1, chunks_TS, -torch.inf)
        rest_XT[:, block] = _rest(max_TC, sums, x_TN.masked_fill_(reached_TN, -torch.inf), temperatures)
    return Scan(values_TL, columns_TM, x_TM, rest_XT[0], rest_XT[1:], overfull_T)


def _largest_chunks(max_TC: Tensor, top_k: int, room: int) -> tuple[Tensor, Tensor]:
    """The bound that the K-th largest chunk reaches [T, 1], NaN in broken rows; and the chunks that reach it.

    The chunks are ascending, as many as in the row that has most of them, and no more than there is room for.
    """
    values_TS, chunks_TS = max_TC.topk(min(room, max_TC.shape[1]), 1)
    bound_T1 = values_TS[:, top_k - 1 : top_k] if values_TS.shape[1] >= top_k else values_TS[:, -1:]
    reaching = max(1, int((values_TS >= bound_T1).sum(1).max()))
    return bound_T1, chunks_TS[:, :reaching].sort(1).values


def _rest(max_TC: Tensor, sums: list[Tensor], x_TN: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Max and sums of what is no candidate: chunks not looked at, and columns below the bound; all others are -inf."""
    top_T = torch.maximum(max_TC.amax(1), x_TN.amax(1))
    base_T1 = finite(top_T)[:, None]
    max_TC, x_TN, rest = max_TC.sub_(base_T1), x_TN.sub_(base_T1), [top_T]
    for sum_TC, temperature in zip(sums, temperatures, strict=True):
        rest.append((max_TC / temperature).exp_().mul_(sum_TC).sum(1) + (x_TN / temperature).exp_().sum(1))
    return torch.stack(rest)


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
    logits_TW: Tensor,
    scan: Scan,
    threshold_T: Tensor,
    ties_T: Tensor,
    top_k: int,
    shard: VocabShard,
    temperature: float,
    labels_T: Tensor | None = None,
) -> Chosen:
    """This rank's columns above the threshold and the first `ties_T` of those equal to it.

    Args:
        scan: of the same logits, with `at_one` where there are labels and the temperature is not 1.
        threshold_T: float32.
        labels_T: int64 global ids.
    """
    real_TW = logits_TW[:, : shard.real_width]
    columns_TK = torch.full((len(logits_TW), top_k), -1, device=logits_TW.device)
    temperatures = (temperature, 1.0) if len(scan.rest_sums_XT) == 2 else (temperature,)
    record_TL = torch.stack([scan.rest_max_T, *scan.rest_sums_XT, scan.rest_max_T, *scan.rest_sums_XT], 1)
    crowded_T = scan.overfull_T | (scan.rest_max_T >= threshold_T) & (ties_T > 0)
    for block in blocks(real_TW):
        candidates = scan.columns_TM[block], scan.x_TM[block]
        _take(*candidates, threshold_T[block], ties_T[block], columns_TK[block], record_TL[block], temperatures)
    for rows in crowded_T.nonzero()[:, 0].split(32) if real_TW.shape[1] else ():
        part_TK, part_TL = columns_TK[rows].fill_(-1), torch.zeros_like(record_TL[rows])
        part_TL[:, 0] = -torch.inf
        every_column = torch.arange(real_TW.shape[1], device=rows.device).expand(len(rows), -1)
        _take(every_column, real_TW[rows].float(), threshold_T[rows], ties_T[rows], part_TK, part_TL, temperatures)
        columns_TK[rows], record_TL[rows] = part_TK, part_TL
    return _choose(real_TW, columns_TK, record_TL, shard, labels_T)


def _take(columns_TM, x_TM, threshold_T, ties_T, columns_TK, record_TL, temperatures):
    """Fills in columns and record, which comes with max and sums of the columns that are not among the M."""
    threshold_T1 = threshold_T[:, None]
    kept_TM = x_TM > threshold_T1
    tie_row, tie = (x_TM == threshold_T1).nonzero().unbind(1)
    fits = place_within(tie_row, len(x_TM)) < ties_T[tie_row]
    kept_TM[tie_row[fits], tie[fits]] = True
    row, place = kept_TM.nonzero().unbind(1)
    slot = place_within(row, len(x_TM))
    columns_TK[row, slot] = columns_TM[row, place]
    entries_TK = x_TM.new_full(columns_TK.shape, -torch.inf)
    entries_TK[row, slot] = x_TM[row, place]
    halves, rest_max_T = record_TL.unflatten(1, (2, -1)).unbind(1), record_TL[:, 0].clone()
    x_TM.masked_fill_(kept_TM, -torch.inf)
    halves[0][:, 0], halves[1][:, 0] = torch.maximum(x_TM.amax(1), rest_max_T), entries_TK.amax(1)
    outside_T1, inside_T1 = (finite(half[:, :1]) for half in halves)
    gap_T, below_TM, below_TK = rest_max_T - outside_T1[:, 0], x_TM.sub_(outside_T1), entries_TK - inside_T1
    for i, temperature in enumerate(temperatures, 1):
        halves[0][:, i] = halves[0][:, i] * (gap_T / temperature).exp() + (below_TM / temperature).exp_().sum(1)
        halves[1][:, i] = (below_TK / temperature).exp_().sum(1)


def _choose(real_TW: Tensor, columns_TK: Tensor, record_TL: Tensor, shard: VocabShard, labels_T: Tensor | None):
    """The entries with their logits, and the record with its lanes in order; with labels, whole."""
    entry_logits_TK = look_up(real_TW, columns_TK)
    sums = record_TL.shape[1] // 2
    lanes = [record_TL[:, [0, 1, sums, sums + 1]]]
    if sums > 2:
        lanes.append(record_TL[:, [2, sums + 2]])
    if labels_T is not None:
        assert shard.size < 1 << 24, shard
        largest_TK = entry_logits_TK == entry_logits_TK.amax(1, keepdim=True)  # in ascending columns
        best_T1 = columns_TK.gather(1, largest_TK.int().argmax(1, keepdim=True)) + shard.start
        lanes += [best_T1.float(), look_up(real_TW, shard.columns(labels_T)[:, None])]
    ids_TK = torch.where(columns_TK >= 0, columns_TK + shard.start, -1)
    return Chosen(ids_TK, entry_logits_TK, torch.cat(lanes, 1))


def look_up(real_TW: Tensor, columns_TK: Tensor) -> Tensor:
    """The logits at some columns, float32; -inf where there is none (-1)."""
    if not real_TW.shape[1]:
        return torch.full_like(columns_TK, -torch.inf, dtype=torch.float32)
    return real_TW.gather(1, columns_TK.clamp(min=0)).float().where(columns_TK >= 0, -torch.inf)


def place_within(row: Tensor, rows: int) -> Tensor:
    """Place of each element within its row, when elements are listed row by row."""
    count = torch.bincount(row, minlength=rows)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
