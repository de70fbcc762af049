"""select_top_k: the teacher's K most likely tokens over a sharded vocabulary, and the mass of all others.

1. `scan_rows` reads this rank's logits once, finds the largest, and sums up those that can not be entries.
2. Each rank's min(K, W) largest logits, in their own dtype, are all-gathered: values alone, no ids.
3. The K-th largest of them is the threshold of the row. Everything above it is kept. Ties at the threshold (the normal
   case in bfloat16) are shared out by ascending id: the gathered values tell how many the ranks before this one hold.
4. `take_entries` picks this rank's entries from what the scan has kept.
5. log-sum-exp inside and outside the entries, each summed directly, go round in one more record of four floats.

Sizes: T tokens, K entries per token, W vocabulary columns on this rank, R ranks, L values sent by
a rank.
"""

from types import ModuleType

import torch
from torch import Tensor

from megakd.kernels import paths
from megakd.kernels.predictions import Predictions, predict
from megakd.kernels.selection_rows import place_within
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
        ValueError: top_k out of range, shapes that do not fit, or a logit that is not finite (on every rank alike).
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
    """`select_top_k` and `predict` of the same logits, which are read once at temperature 1.

    The most likely id is an entry, the log-sum-exp of all logits is that by which the entries are normalised (the same
    sum as that of `predict` in another order), and the label's logit is one more look-up. At another temperature the
    log-sum-exp at temperature 1 takes a read of its own.

    Args:
        labels_T: int64 global ids, -100 for none. The rest as for `select_top_k`.
    Raises:
        ValueError: as `select_top_k`.
    Collectives: those of `select_top_k`, with 6 floats instead of 4 in the second; none of `predict` but at another
        temperature than 1.
    """
    if temperature != 1:
        targets = select_top_k(logits_TW, top_k, shard, temperature, gather=gather)
        return targets, predict(logits_TW, labels_T, shard)
    return choose(logits_TW, labels_T, top_k, shard, temperature, gather)


def choose(
    logits_TW: Tensor, labels_T: Tensor | None, top_k: int, shard: VocabShard, temperature: float, gather: bool
) -> tuple[TeacherTargets, Predictions | None]:
    """The targets, and given labels (at temperature 1) the predictions."""
    shard.check_logits(logits_TW, "teacher logits")
    if not 1 <= top_k <= shard.size:
        raise ValueError(f"top_k must be between 1 and the vocabulary of {shard.size}, not {top_k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, not {temperature}")
    passes = selection_passes(logits_TW)
    scan = passes.scan_rows(logits_TW, top_k, shard, temperature)
    values_RTL = shard.all_gather(scan.values_TL)
    check_finite(values_RTL)
    threshold_T, ties_T = share(values_RTL, top_k, shard.rank)
    real_TW = logits_TW[:, : shard.real_width]
    columns_TK, record_TL = passes.take_entries(real_TW, scan, threshold_T, ties_T, top_k, temperature)
    entries_TK = look_up(real_TW, columns_TK)
    if labels_T is not None:
        record_TL = torch.cat([record_TL, best_and_label(real_TW, columns_TK, entries_TK, labels_T, shard)], 1)
    records_RTL = shard.all_gather(record_TL)
    logprobs_TK, log_tail_T, top_T, log_all_T = normalize(entries_TK, records_RTL, temperature)
    said = None if labels_T is None else predicted(records_RTL, top_T, log_all_T, labels_T)
    ids_TK = torch.where(columns_TK >= 0, columns_TK + shard.start, -1)
    if gather and shard.ranks > 1:
        ids_TK, logprobs_TK = gather_entries(ids_TK, logprobs_TK, shard)
    return TeacherTargets(ids_TK, logprobs_TK, log_tail_T, temperature), said


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


def look_up(logits_TW: Tensor, columns_TK: Tensor) -> Tensor:
    """The logits at some columns, float32; -inf where there is none (-1)."""
    if not logits_TW.shape[1]:
        return torch.full_like(columns_TK, -torch.inf, dtype=torch.float32)
    return logits_TW.gather(1, columns_TK.clamp(min=0)).float().where(columns_TK >= 0, -torch.inf)


def normalize(entries_TK: Tensor, records_RTL: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of this rank's entries, -inf for none, and the log mass outside everyone's, float32; and the
    largest of all logits, and their log-sum-exp less the largest / temperature, float64."""
    outside_max_RT, outside_sum_RT, entry_max_RT, entry_sum_RT = records_RTL[:, :, :4].double().unbind(2)
    top_T = entry_max_RT.amax(0)  # of all logits: the entries are the largest
    log_outside_T = (outside_sum_RT.log() + (outside_max_RT - top_T) / temperature).logsumexp(0)
    log_entries_T = (entry_sum_RT.log() + (entry_max_RT - top_T) / temperature).logsumexp(0)
    log_all_T = torch.logaddexp(log_outside_T, log_entries_T)
    logprobs_TK = (entries_TK - top_T[:, None].float()) / temperature - log_all_T[:, None].float()
    return logprobs_TK, (log_outside_T - log_all_T).float(), top_T, log_all_T


def best_and_label(
    logits_TW: Tensor, columns_TK: Tensor, entries_TK: Tensor, labels_T: Tensor, shard: VocabShard
) -> Tensor:
    """Two lanes more of the record: the id of this rank's largest entry, lowest among equals, and the label's logit.

    An id is exact in float32 up to 2^24, which no vocabulary reaches.
    """
    assert shard.size < 1 << 24, shard
    largest_TK = entries_TK == entries_TK.amax(1, keepdim=True)  # in ascending columns
    first_T1 = largest_TK.int().argmax(1, keepdim=True)
    best_T1 = (columns_TK.gather(1, first_T1) + shard.start).float()
    return torch.cat([best_T1, look_up(logits_TW, shard.columns(labels_T)[:, None])], 1)


def predicted(records_RTL: Tensor, top_T: Tensor, log_all_T: Tensor, labels_T: Tensor) -> Predictions:
    """What `predict` gives, from records with the two lanes of `best_and_label`."""
    entry_max_RT, best_RT, label_RT = records_RTL[:, :, [2, 4, 5]].unbind(2)
    best_T = best_RT.long().masked_fill(entry_max_RT < top_T, torch.iinfo(torch.int64).max).amin(0)
    label_logprob_T = label_RT.amax(0).double() - top_T - log_all_T
    return Predictions(best_T, -log_all_T.float(), label_logprob_T.where(labels_T >= 0, 0.0).float())


def gather_entries(ids_TK: Tensor, logprobs_TK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """All entries of a row on every rank, at most K, ascending from rank to rank; empty slots last."""
    ids_TRK, logprobs_TRK = (shard.all_gather(x).transpose(0, 1).flatten(1) for x in (ids_TK, logprobs_TK))
    row, place = (ids_TRK >= 0).nonzero().unbind(1)
    slot = place_within(row, len(ids_TK))
    ids_TK, logprobs_TK = torch.full_like(ids_TK, -1), torch.full_like(logprobs_TK, -torch.inf)
    ids_TK[row, slot], logprobs_TK[row, slot] = ids_TRK[row, place], logprobs_TRK[row, place]
    return ids_TK, logprobs_TK


def selection_passes(logits_TW: Tensor) -> ModuleType:
    """The module with `scan_rows` and `take_entries` for these logits."""
    return paths.choose(logits_TW, "megakd.kernels.selection_rows", "megakd.kernels.triton.selection_rows")
