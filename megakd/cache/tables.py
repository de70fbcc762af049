"""A row's entries as tables with a fixed number of slots, which is what the losses read; exact truncation to fewer.

Sizes: T tokens of one sample, H channels, K slots, N entries of all tokens together.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megakd.cache.row import Row
from megakd.cache.segments import spread, starts, uniform_count
from megakd.errors import CacheError


class Table(NamedTuple):
    """Entries of T tokens, in the terms of `TeacherTargets`, and what a lesson needs beside them; numpy arrays.

    ids_TK: int64, ascending in a row, -1 for an empty slot. logprobs_TK: float32, -inf there. log_tail_T: float32.
    label_logprob_T, entropy_T: float32; entropy_T is None unless sampled. top_id_T: int64.
    """

    ids_TK: np.ndarray
    logprobs_TK: np.ndarray
    log_tail_T: np.ndarray
    label_logprob_T: np.ndarray
    top_id_T: np.ndarray
    entropy_T: np.ndarray | None

    def rows(self, index_T: np.ndarray) -> "Table":
        """Some tokens."""
        return Table(*(None if column is None else column[index_T] for column in self))


class HiddenTable(NamedTuple):
    """What the teacher's output layer is given for T tokens, on the CPU."""

    hidden_TH: Tensor

    def rows(self, index_T: np.ndarray) -> "HiddenTable":
        """Some tokens."""
        return HiddenTable(self.hidden_TH[torch.from_numpy(index_T)])


def build_table(row: Row, top_k: int | None = None) -> Table:
    """The row's entries with as many slots as its fullest token needs, or at most the `top_k` most likely.

    Args:
        row: decoded at one temperature: `log_tail_XT` is that temperature's (its first row is read).
        top_k: keep the most likely entries, the lower id among equals, and move the mass of the others to the tail;
            None keeps all.
    Raises:
        CacheError: truncation of sampled rows, whose entries are draws and not the most likely ids.
    """
    tokens, slots = len(row.counts_T), int(row.counts_T.max(initial=0))
    if uniform_count(row.counts_T):
        ids_TK, logprobs_TK = row.ids_N.reshape(tokens, slots), row.logprobs_N.reshape(tokens, slots)
    else:
        place_N = np.arange(len(row.ids_N)) - spread(starts(row.counts_T), row.counts_T)
        token_N = spread(np.arange(tokens), row.counts_T)
        ids_TK = np.full((tokens, slots), -1, np.int64)
        logprobs_TK = np.full((tokens, slots), -np.inf, np.float32)
        ids_TK[token_N, place_N], logprobs_TK[token_N, place_N] = row.ids_N, row.logprobs_N
    sampled = row.entropy_T is not None
    log_tail_T = np.full(tokens, -np.inf, np.float32) if sampled else row.log_tail_XT[0]
    table = Table(ids_TK, logprobs_TK, log_tail_T, row.label_logprob_T, row.top_id_T, row.entropy_T)
    if top_k is None or slots <= top_k:
        return table
    if sampled:
        raise CacheError(
            f"the cache holds up to {slots} drawn entries a token; the {top_k} most likely of them are no sample",
            hint="leave loss.top_k at what the cache was recorded with",
        )
    return truncate(table, top_k)


def truncate(table: Table, top_k: int) -> Table:
    """The `top_k` most likely entries of each token; the mass of the others goes to the tail, summed directly."""
    order_TK = np.argsort(-table.logprobs_TK, axis=1, kind="stable")  # ids ascend, so the lower id comes first
    kept_TK = np.sort(order_TK[:, :top_k], axis=1)
    dropped_TK = np.take_along_axis(table.logprobs_TK, order_TK[:, top_k:], 1).astype(np.float64)
    with np.errstate(divide="ignore"):
        log_dropped_T = np.log(np.exp(dropped_TK).sum(1))
    log_tail_T = np.logaddexp(table.log_tail_T.astype(np.float64), log_dropped_T).astype(np.float32)
    return table._replace(
        ids_TK=np.take_along_axis(table.ids_TK, kept_TK, 1),
        logprobs_TK=np.take_along_axis(table.logprobs_TK, kept_TK, 1),
        log_tail_T=log_tail_T,
    )
