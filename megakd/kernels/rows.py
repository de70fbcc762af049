"""The passes over whole rows of logits, a few rows at a time, in plain PyTorch.

This is the seam between the losses and the machine: another implementation (Triton) offers the same functions, with the
same signatures. Everything else works on [T], [T, K] and a few numbers per rank.

    statistics   one read of the student's logits                 forward of kd_loss
    backward     one read of them and one write of the gradient   backward of kd_loss
    summarize    one read of the teacher's logits                 select_top_k, sample_targets
    extremes     one read of either's                             predict

Sizes: T tokens, K entries per token, W columns on this rank, of which the first `width` are real and the rest padding,
C chunks of the columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20  # fp32 working set of one row block: half the L2 cache of a server core; the rest flows through
DEVICE_BLOCK_BYTES = 1 << 28  # on other devices, where what counts is the number of launches


class Statistics(NamedTuple):
    """What one read of the logits gives; all float32.

    max_T: largest logit outside the entries (raw, not divided by temperature); -inf when there is none.
    sum_T: sum of exp((x - max) / temperature) over the columns outside the entries; 0 when there is none.
    sum_at_one_T: the same at temperature 1; None when the temperature is 1.
    entry_logits_TK: raw logits of the entries; -inf in empty slots.
    label_logit_T: raw logit of the label; -inf when the label is not on this rank.
    """

    max_T: Tensor
    sum_T: Tensor
    sum_at_one_T: Tensor | None
    entry_logits_TK: Tensor
    label_logit_T: Tensor


class Extremes(NamedTuple):
    """The largest logit and its surroundings; float32, and int64 columns.

    max_T: largest logit of the row; -inf when there is none. column_T: its column, the lowest among equals.
    sum_T: sum of exp(x - max). label_logit_T: -inf when the label is not on this rank.
    """

    max_T: Tensor
    column_T: Tensor
    sum_T: Tensor
    label_logit_T: Tensor


class Chunks(NamedTuple):
    """What one read of the logits gives for each chunk of columns; float32.

    max_TC: largest logit; NaN in all chunks of a row that holds anything but finite numbers.
    sum_TC: sum of e = exp((x - max) / temperature). sum_at_one_TC: the same at temperature 1.
    drift_TC: sum of e (x - max) / temperature. column_TC: the first column that holds the maximum, int32.
    The last three are None where they were not asked for.
    """

    max_TC: Tensor
    sum_TC: Tensor
    sum_at_one_TC: Tensor | None
    drift_TC: Tensor | None
    column_TC: Tensor | None


def statistics(
    logits_TW: Tensor, columns_TK: Tensor, label_columns_T: Tensor, supervised_T: Tensor, width: int, temperature: float
) -> Statistics:
    """One read of the logits: log-sum-exp of what lies outside the entries, and the logits at entries and label.

    Args:
        logits_TW: float32, bfloat16 or float16, any strides; columns from `width` on are never read. Not modified.
        columns_TK: this rank's column of each entry, in any order, unique in a row; -1 for none; int64.
        label_columns_T: this rank's column of the label; -1 for none; int64.
        supervised_T: bool; a row that is False is not read and gets -inf, 0, 0, -inf, -inf.
        width: number of real columns, 0 <= width <= W.
        temperature: of the student.
    """
    tokens, top_k = columns_TK.shape
    picked_columns_TK = _or_last(torch.cat([columns_TK, label_columns_T[:, None]], 1), width)
    picked_TK = logits_TW.new_full((tokens, top_k + 1), -torch.inf, dtype=torch.float32)
    max_T = picked_TK.new_full((tokens,), -torch.inf)
    sum_T = torch.zeros_like(max_T)
    sum_at_one_T = None if temperature == 1 else torch.zeros_like(max_T)
    for rows, x, spare in row_blocks(logits_TW, supervised_T, width, spare=temperature != 1):
        columns = picked_columns_TK[rows]
        picked_TK[rows] = x.gather(1, columns)
        x.scatter_(1, columns[:, :top_k], -torch.inf)
        top = x.amax(1, keepdim=True)
        max_T[rows] = top[:, 0]
        x -= finite(top)
        if temperature != 1:
            sum_at_one_T[rows] = torch.exp(x, out=spare).sum(1)
            x *= 1 / temperature
        sum_T[rows] = x.exp_().sum(1)
    return Statistics(max_T, sum_T, sum_at_one_T, picked_TK[:, :top_k], picked_TK[:, top_k])


def backward(
    logits_TW: Tensor,
    columns_TK: Tensor,
    label_columns_T: Tensor,
    supervised_T: Tensor,
    width: int,
    temperature: float,
    max_T: Tensor,
    outside_T: Tensor,
    outside_at_one_T: Tensor | None,
    entry_grad_TK: Tensor,
    label_grad_T: Tensor,
    out_TW: Tensor,
) -> None:
    """One read of the logits and one write of the gradient, rounded once to the dtype of `out_TW`:

        out[t, column of entry k] = entry_grad[t, k]
        out[t, j] = outside[t] * exp((x[t, j] - max[t]) / temperature) + outside_at_one[t] * exp(x[t, j] - max[t])
                    + label_grad[t] if j is the label's column          for every other real column
        out[t, j] = 0                                                   for padding, and for rows not supervised

    Args:
        logits_TW, columns_TK, label_columns_T, supervised_T, width, temperature: as in `statistics`.
        max_T: of all ranks, finite; the entries may lie any distance above it. float32.
        outside_T, outside_at_one_T: factors, float32; the second is None when it would be 0.
        entry_grad_TK: final values of the entries (a label among them included), float32; empty slots are ignored.
        label_grad_T: float32.
        out_TW: written; may be `logits_TW` itself.
    """
    columns_TK, label_columns_T = _or_last(columns_TK, width), _or_last(label_columns_T, width)
    max_T1, outside_T1, label_columns_T1, label_grad_T1 = (
        x_T[:, None] for x_T in (max_T, outside_T, label_columns_T, label_grad_T)
    )
    for rows, x, spare in row_blocks(logits_TW, supervised_T, width, spare=outside_at_one_T is not None):
        x -= max_T1[rows]
        if spare is not None:
            torch.exp(x, out=spare).mul_(outside_at_one_T[rows, None])
        if temperature != 1:
            x *= 1 / temperature
        x.exp_().mul_(outside_T1[rows])
        if spare is not None:
            x += spare
        x.scatter_add_(1, label_columns_T1[rows], label_grad_T1[rows])
        x.scatter_(1, columns_TK[rows], entry_grad_TK[rows])
        if isinstance(rows, slice):
            out_TW[rows, :width].copy_(x[:, :width])
        else:
            out_TW[rows, :width] = x[:, :width].to(out_TW.dtype)
    out_TW[:, width:] = 0
    if not supervised_T.all():
        out_TW[~supervised_T] = 0


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
    """One read of the logits: maximum and sums of every chunk, where column j is in chunk j % chunks.

    Args:
        logits_TW, width: as in `statistics`; every row is read.
        chunks: 1 <= chunks <= width.
        at_one, drift, column: what is wanted beside the sum at `temperature`.
    """
    tokens, height = len(logits_TW), -(-width // chunks)
    max_TC = logits_TW.new_empty((tokens, chunks), dtype=torch.float32)
    sum_TC, spare = torch.empty_like(max_TC), None
    sum_at_one_TC, drift_TC = (torch.empty_like(max_TC) if wanted else None for wanted in (at_one, drift))
    column_TC = torch.empty_like(max_TC, dtype=torch.int32) if column else None
    rows_per_block = max(1, block_bytes(logits_TW) // (4 * height * chunks * (1 + (at_one or drift))))
    buffer = max_TC.new_empty((rows_per_block, height * chunks))
    second = torch.empty_like(buffer) if at_one or drift else None
    total_T = max_TC.new_empty(tokens)
    for first in range(0, tokens, rows_per_block):
        rows = slice(first, min(first + rows_per_block, tokens))
        x = buffer[: rows.stop - first]
        x[:, :width].copy_(logits_TW[rows, :width])
        torch.sum(x[:, :width], 1, out=total_T[rows])
        x[:, width:] = -torch.inf
        x = x.view(-1, height, chunks)
        if second is not None:
            spare = second[: len(x)].view(x.shape)
        if column:
            max_TC[rows], step = x.max(1)  # the first of equals, says torch
            column_TC[rows] = step * chunks + torch.arange(chunks, device=x.device)
        else:
            torch.amax(x, 1, out=max_TC[rows])
        x -= max_TC[rows, None]
        if at_one:
            torch.sum(torch.exp(x, out=spare), 1, out=sum_at_one_TC[rows])
        if temperature != 1:
            x *= 1 / temperature
        torch.sum(torch.exp(x, out=spare if drift else x), 1, out=sum_TC[rows])
        if drift:
            x.flatten(1)[:, width:] = 0  # it is -inf there
            torch.sum(x.mul_(spare), 1, out=drift_TC[rows])
    suspect = (~total_T.isfinite()).nonzero()[:, 0]  # the sum of finite logits may overflow, others never end finite
    for row in suspect.tolist():
        if not logits_TW[row, :width].isfinite().all():
            max_TC[row] = torch.nan
    return Chunks(max_TC, sum_TC, sum_at_one_TC, drift_TC, column_TC)


def extremes(logits_TW: Tensor, label_columns_T: Tensor, width: int) -> Extremes:
    """One read of the logits: where each row is largest, its log-sum-exp, and the label's logit. Every row is read.

    Args:
        logits_TW, label_columns_T, width: as in `statistics`. A NaN in a row makes its sum NaN.
    """
    max_T = torch.full_like(label_columns_T, -torch.inf, dtype=torch.float32)
    sum_T, label_logit_T, column_T = torch.zeros_like(max_T), max_T.clone(), torch.zeros_like(label_columns_T)
    label_columns_T = _or_last(label_columns_T, width)
    for rows, x, _ in row_blocks(logits_TW, torch.ones_like(max_T, dtype=torch.bool), width):
        label_logit_T[rows] = x.gather(1, label_columns_T[rows, None])[:, 0]
        max_T[rows], column_T[rows] = top_T, _ = x.max(1)  # the first of equals, says torch
        sum_T[rows] = x.sub_(finite(top_T)[:, None]).exp_().sum(1)
    return Extremes(max_T, column_T, sum_T, label_logit_T)


def row_blocks(
    logits_TW: Tensor, supervised_T: Tensor, width: int, *, spare: bool = False
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
    """Yields (rows, block, spare): the supervised rows in order, a few at a time, as float32 in a reused buffer.

    The block has width + 1 columns; the last one holds -inf and takes what is to go nowhere. `rows` indexes the first
    axis of any [T, ...] tensor. The spare buffer has the block's shape and no content.
    """
    rows_per_block = max(1, block_bytes(logits_TW) // (4 * (width + 1) * (1 + spare)))
    buffer = logits_TW.new_empty((rows_per_block, width + 1), dtype=torch.float32)
    second = torch.empty_like(buffer) if spare else None
    for rows in runs(supervised_T, rows_per_block):
        source = logits_TW[rows, :width]
        block = buffer[: len(source)]
        block[:, :width].copy_(source)
        block[:, width] = -torch.inf
        yield rows, block, second[: len(source)] if spare else None


def block_bytes(logits_TW: Tensor) -> int:
    """What the float32 buffers of one row block may take, on the logits' device."""
    return BLOCK_BYTES if logits_TW.device.type == "cpu" else DEVICE_BLOCK_BYTES


def runs(supervised_T: Tensor, length: int, *, all_of_them: bool = False) -> Iterator[slice | Tensor]:
    """The supervised rows in pieces of `length`; a piece without gaps as a slice, which copies nothing.

    Waits for the device once, however many pieces there are; not at all where it is known that all of them are.
    """
    if all_of_them:
        for first in range(0, len(supervised_T), length):
            yield slice(first, min(first + length, len(supervised_T)))
        return
    index = supervised_T.cpu().nonzero()[:, 0]
    for piece in index.split(length) if len(index) else ():
        first, last = int(piece[0]), int(piece[-1])
        gaps = last - first + 1 > len(piece)
        yield piece.to(supervised_T.device, non_blocking=True) if gaps else slice(first, last + 1)


def finite(x: Tensor) -> Tensor:
    """x with 0 for -inf; NaN and +inf pass through."""
    return x.masked_fill(x == -torch.inf, 0)


def _or_last(columns: Tensor, width: int) -> Tensor:
    return columns.where(columns >= 0, width)
