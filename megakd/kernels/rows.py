"""The two passes over the student's logits, row block by row block, in plain PyTorch.

This is the seam between the loss and the machine: another implementation (Triton) offers the same two functions.
Everything else of the loss works on [T], [T, K] and a few numbers per rank.

Sizes: T tokens, K entries per token, W columns on this rank, of which the first `width` are real and the rest padding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20  # fp32 working set of one row block: half of a common L2 cache


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
    max_T = logits_TW.new_full((tokens,), -torch.inf, dtype=torch.float32)
    sum_T = torch.zeros_like(max_T)
    sum_at_one_T = None if temperature == 1 else torch.zeros_like(max_T)
    entry_logits_TK = max_T[:, None].repeat(1, top_k)
    label_logit_T = max_T.clone()
    for rows, x, spare in row_blocks(logits_TW, supervised_T, width, spare=temperature != 1):
        columns, label_columns = _or_last(columns_TK[rows], width), _or_last(label_columns_T[rows, None], width)
        entry_logits_TK[rows] = x.gather(1, columns)
        label_logit_T[rows] = x.gather(1, label_columns)[:, 0]
        x.scatter_(1, columns, -torch.inf)
        max_T[rows] = top = x.amax(1)
        x -= top.masked_fill(top == -torch.inf, 0)[:, None]
        if temperature != 1:
            sum_at_one_T[rows] = torch.exp(x, out=spare).sum(1)
            x *= 1 / temperature
        sum_T[rows] = x.exp_().sum(1)
    return Statistics(max_T, sum_T, sum_at_one_T, entry_logits_TK, label_logit_T)


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
    for rows, x, spare in row_blocks(logits_TW, supervised_T, width, spare=outside_at_one_T is not None):
        x -= max_T[rows, None]
        if spare is not None:
            torch.exp(x, out=spare).mul_(outside_at_one_T[rows, None])
        if temperature != 1:
            x *= 1 / temperature
        x.exp_().mul_(outside_T[rows, None])
        if spare is not None:
            x += spare
        x.scatter_add_(1, _or_last(label_columns_T[rows, None], width), label_grad_T[rows, None])
        x.scatter_(1, _or_last(columns_TK[rows], width), entry_grad_TK[rows])
        out_TW[rows, :width] = x[:, :width].to(out_TW.dtype)
    out_TW[:, width:] = 0
    if not supervised_T.all():
        out_TW[~supervised_T] = 0


def row_blocks(
    logits_TW: Tensor, supervised_T: Tensor, width: int, *, spare: bool = False
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
    """Yields (rows, block, spare): the supervised rows in order, a few at a time, as float32 in a reused buffer.

    The block has width + 1 columns; the last one holds -inf and takes what is to go nowhere. `rows` indexes the first
    axis of any [T, ...] tensor. The spare buffer has the block's shape and no content.
    """
    rows_per_block = max(1, BLOCK_BYTES // (4 * (width + 1) * (1 + spare)))
    buffer = logits_TW.new_empty((rows_per_block, width + 1), dtype=torch.float32)
    second = torch.empty_like(buffer) if spare else None
    for rows in _runs(supervised_T, rows_per_block):
        source = logits_TW[rows, :width]
        block = buffer[: len(source)]
        block[:, :width].copy_(source)
        block[:, width] = -torch.inf
        yield rows, block, second[: len(source)] if spare else None


def _runs(supervised_T: Tensor, length: int) -> Iterator[slice | Tensor]:
    """The supervised rows in pieces of `length`; a piece without gaps as a slice, which copies nothing."""
    index = supervised_T.nonzero()[:, 0]
    for piece in index.split(length) if len(index) else ():
        first, last = int(piece[0]), int(piece[-1])
        yield slice(first, last + 1) if last - first + 1 == len(piece) else piece


def _or_last(columns: Tensor, width: int) -> Tensor:
    return columns.where(columns >= 0, width)
