"""select_top_k: the teacher's K most likely tokens over a sharded vocabulary, and the mass of all others.

1. `scan_rows` reads this rank's logits once, finds the largest, and sums up those that can not be entries.
2. Each rank's min(K, W) largest logits, in their own dtype, are all-gathered: values alone, no ids.
3. The K-th largest of them is the threshold of the row. Everything above it is kept. Ties at the threshold (the normal
   case in bfloat16) are shared out by ascending id: the gathered values tell how many the ranks before this one hold.
4. `take_entries` picks this rank's entries from what the scan has kept.
5. log-sum-exp inside and outside the entries, each summed directly, go round in one more record of four floats.

With Triton these are a handful of launches, and nothing waits for the device: a CUDA graph can hold them.

Sizes: T tokens, K entries per token, W vocabulary columns on this rank, R ranks, L values sent by a rank.
"""

from types import ModuleType

import torch
from torch import Tensor

from megakd.kernels import paths
from megakd.kernels.checks import expect
from megakd.kernels.predictions import Predictions
from megakd.kernels.vocab import VocabShard
from megakd.targets import TeacherTargets


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
        ValueError: top_k out of range, shapes that do not fit, or a logit that is not finite (on every rank alike; on
            CUDA the device stops instead: `checks.expect`).
    Collectives: all-gather of min(K, W) values in the logits' dtype, and of 4 floats, per token and rank; with `gather`
        also K ids and K floats. W must not differ by more than rounding from rank to rank when it is below K.
    """
    targets, _ = choose(logits_TW, None, top_k, shard, temperature, gather)
    return targets


@torch.no_grad()
def select_and_predict(
    logits_TW: Tensor,
    labels_T: Tensor,
    top_k: int,
    shard: VocabShard,
    temperature: float = 1.0,
    *,
    gather: bool = False,
) -> tuple[TeacherTargets, Predictions]:
    """`select_top_k` and `predict` of the same logits, which are read once.

    The most likely id is an entry, the log-sum-exp at temperature 1 is that by which the entries are normalised or a
    sum beside it (that of `predict` in another order), and the label's logit is one more look-up.

    Args:
        labels_T: int64 global ids, -100 for none. The rest as for `select_top_k`.
    Raises:
        ValueError: as `select_top_k`.
    Collectives: those of `select_top_k`, with 6 floats instead of 4 in the second, 8 at another temperature than 1.
    """
    return choose(logits_TW, labels_T, top_k, shard, temperature, gather)


def choose(
    logits_TW: Tensor, labels_T: Tensor | None, top_k: int, shard: VocabShard, temperature: float, gather: bool
) -> tuple[TeacherTargets, Predictions | None]:
    """The targets, and given labels the predictions."""
    shard.check_logits(logits_TW, "teacher logits")
    if not 1 <= top_k <= shard.size:
        raise ValueError(f"top_k must be between 1 and the vocabulary of {shard.size}, not {top_k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, not {temperature}")
    passes, steps = selection_passes(logits_TW), selection_steps(logits_TW)
    scan = passes.scan_rows(logits_TW, top_k, shard, temperature, at_one=labels_T is not None and temperature != 1)
    threshold_T, ties_T, fine_T = steps.share(shard.all_gather(scan.values_TL), top_k, shard.rank)
    expect_finite(fine_T)
    chosen = passes.take_entries(logits_TW, scan, threshold_T, ties_T, top_k, shard, temperature, labels_T)
    records_RTL = shard.all_gather(chosen.record_TL)
    logprobs_TK, log_tail_T, said = steps.normalize(chosen.entry_logits_TK, records_RTL, labels_T, temperature)
    ids_TK = chosen.ids_TK
    if gather and shard.ranks > 1:
        ids_TK, logprobs_TK = join(shard.all_gather(ids_TK), shard.all_gather(logprobs_TK))
    return TeacherTargets(ids_TK, logprobs_TK, log_tail_T, temperature), said


def expect_finite(fine_T: Tensor) -> None:
    """On every rank alike; see `checks.expect`.

    Raises:
        ValueError: a row of the teacher's logits is not finite.
    """

    def explain():
        raise ValueError(
            f"the teacher's logits hold NaN or infinity in {int((~fine_T).sum())} of {len(fine_T)} rows, first in row "
            f"{int((~fine_T).nonzero()[0])}"
        )

    expect(fine_T, "the teacher's logits hold NaN or infinity", explain)


def join(ids_RTK: Tensor, logprobs_RTK: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks' entries of a row, at most K, ascending from rank to rank; empty slots last."""
    ids_TN, logprobs_TN = (x_RTK.transpose(0, 1).flatten(1) for x_RTK in (ids_RTK, logprobs_RTK))
    used_TN, room = ids_TN >= 0, (len(ids_TN), ids_RTK.shape[2] + 1)
    slot_TN = (used_TN.cumsum(1) - 1).where(used_TN, room[1] - 1)  # the last is for what is not used
    ids_TK, logprobs_TK = ids_TN.new_full(room, -1), logprobs_TN.new_full(room, -torch.inf)
    return tuple(
        x_TK.scatter_(1, slot_TN, x_TN)[:, :-1].contiguous()
        for x_TK, x_TN in ((ids_TK, ids_TN), (logprobs_TK, logprobs_TN))
    )


def selection_passes(logits_TW: Tensor) -> ModuleType:
    """The module with `scan_rows` and `take_entries` for these logits."""
    return paths.choose(logits_TW, "megakd.kernels.selection_rows", "megakd.kernels.triton.selection_rows")


def selection_steps(logits_TW: Tensor) -> ModuleType:
    """The module with `share` and `normalize` for these logits."""
    return paths.choose(logits_TW, "megakd.kernels.selection_steps", "megakd.kernels.triton.selection_steps")
