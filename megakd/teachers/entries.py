"""Which entries of a teacher's logits a recording keeps: the most likely (up to a mass, with the label), or draws.

Legend: T supervised tokens, W vocabulary columns on this rank, K entries, X temperatures, R ranks.
"""

import dataclasses
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.kernels import VocabShard, sample_targets
from megakd.kernels.paths import row_passes
from megakd.kernels.predictions import Predictions
from megakd.kernels.sampling import sample_and_predict
from megakd.kernels.selection import select_and_predict
from megakd.targets import TeacherTargets

UNLIKELY = 1000.0  # nats below the likeliest other id: e^-1000 is 0
FLOOR = -1e30  # of a rank that has no other id


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which entries are kept.

    Attributes:
        mode: top_k, top_p, sampled or hybrid; of hidden, which keeps no entries, the rest says nothing.
        top_k: most entries of a token; of hybrid, those that are not drawn.
        temperatures: each with a tail; entries are given at the first.
        top_p: mass that the entries reach, top_k permitting.
        keep_label: the label takes the place of the least likely entry where it is not among them.
    """

    mode: str
    top_k: int
    temperatures: tuple[float, ...]
    top_p: float | None = None
    keep_label: bool = False
    draws: int = 0

    @property
    def drawn(self) -> bool:
        """Whether entries stand for the whole vocabulary."""
        return self.mode in ("sampled", "hybrid")

    @property
    def slots(self) -> int:
        """Most entries that a token can have."""
        return {"sampled": self.draws, "hybrid": self.top_k + self.draws}.get(self.mode, self.top_k)


class Entries(NamedTuple):
    """All entries of some tokens, on every rank.

    ids_TK: ascending, -1 for an empty slot, last. logprobs_TK: at the first temperature. log_tail_XT: at each.
    label_logprob_T, top_id_T: at temperature 1. Drawn entries have no tail (X = 0) but the exact entropy_T.
    """

    ids_TK: Tensor
    logprobs_TK: Tensor
    log_tail_XT: Tensor
    label_logprob_T: Tensor
    top_id_T: Tensor
    entropy_T: Tensor | None = None


@torch.no_grad()
def choose_entries(logits_TW: Tensor, labels_T: Tensor, shard: VocabShard, recipe: Recipe) -> Entries:
    """What a recording keeps of the teacher's logits.

    Args:
        logits_TW: the teacher's; not modified.
        labels_T: int64 global ids.
        shard: which ids the columns are.
    Collectives: those of `select_and_predict` with gather; for each further temperature, and for all of
        them with keep_label, one of 2 floats and one of K floats per token and rank.
    """
    first = recipe.temperatures[0]
    targets, said = select_and_predict(logits_TW, labels_T, recipe.top_k, shard, first, gather=True)
    ids_TK, known = targets.ids_TK, [(targets.logprobs_TK, targets.log_tail_T)]
    if recipe.keep_label:
        ids_TK, known = with_label(ids_TK, targets.logprobs_TK, labels_T), []
    for temperature in recipe.temperatures[len(known) :]:
        known.append(entries_at(logits_TW, ids_TK, shard, temperature))
    logprobs_XTK, log_tail_XT = (torch.stack(parts) for parts in zip(*known, strict=True))
    if recipe.mode == "top_p":
        kept_TK = reaches(logprobs_XTK[0], recipe.top_p) | (recipe.keep_label & (ids_TK == labels_T[:, None]))
        ids_TK, logprobs_XTK, log_tail_XT = drop_entries(ids_TK, logprobs_XTK, log_tail_XT, kept_TK)
    return Entries(ids_TK, logprobs_XTK[0], log_tail_XT, said.label_logprob_T, said.id_T)


@torch.no_grad()
def draw_entries(
    logits_TW: Tensor, labels_T: Tensor, shard: VocabShard, recipe: Recipe, groups: list[tuple[Tensor, int]]
) -> Entries:
    """Draws from the teacher's distribution, or its most likely entries and draws from the others.

    Args:
        logits_TW, labels_T, shard: as for `choose_entries`.
        groups: (rows, seed) of each sample, so that its draws depend on nothing else; together all rows.
    Collectives: for each group those of `sample_and_predict` or, in hybrid mode, of `select_and_predict` and
        `sample_targets`, with gather.
    """
    top_id_T, label_logprob_T = torch.empty_like(labels_T), torch.empty_like(labels_T, dtype=torch.float32)
    ids_TK = torch.full((len(labels_T), recipe.slots), -1, device=logits_TW.device)
    logprobs_TK = torch.full_like(ids_TK, -torch.inf, dtype=torch.float32)
    entropy_T = logprobs_TK.new_zeros(len(labels_T))
    temperature = recipe.temperatures[0]
    for rows_T, seed in groups:
        generator = torch.Generator(logits_TW.device).manual_seed(seed)
        given = logits_TW[rows_T], labels_T[rows_T]
        if recipe.mode == "sampled":
            targets, said = sample_and_predict(*given, recipe.draws, shard, generator, temperature, gather=True)
        else:
            targets, said = head_and_draws(*given, shard, recipe, generator)
        label_logprob_T[rows_T], top_id_T[rows_T] = said.label_logprob_T, said.id_T
        ids_TK[rows_T], logprobs_TK[rows_T], entropy_T[rows_T] = targets.ids_TK, targets.logprobs_TK, targets.entropy_T
    no_tail_XT = logprobs_TK.new_empty((0, len(labels_T)))
    return Entries(ids_TK, logprobs_TK, no_tail_XT, label_logprob_T, top_id_T, entropy_T)


def head_and_draws(
    logits_TW: Tensor, labels_T: Tensor, shard: VocabShard, recipe: Recipe, generator: torch.Generator
) -> tuple[TeacherTargets, Predictions]:
    """The K most likely entries as they are, and draws from the rest, each of weight (mass of the rest) / draws.

    And what the teacher would say.

    The entropy is that of the whole distribution: of the K entries, of the rest, and of the choice between them.
    """
    temperature = recipe.temperatures[0]
    head, said = select_and_predict(logits_TW, labels_T, recipe.top_k, shard, temperature, gather=True)
    if recipe.top_k == shard.size:
        none_TN = head.ids_TK.new_full((len(logits_TW), recipe.draws), -1)
        rest = replace(head, ids_TK=none_TN, logprobs_TK=torch.full_like(none_TN, -torch.inf, dtype=torch.float32))
        rest_entropy_T = torch.zeros_like(head.log_tail_T)
    else:
        rest = sample_targets(
            without(logits_TW, head.ids_TK, shard, temperature),
            recipe.draws,
            shard,
            generator,
            temperature,
            gather=True,
        )
        rest_entropy_T = rest.entropy_T
    log_rest_T = head.log_tail_T
    ids_TK, order_TK = sort_entries(torch.cat([head.ids_TK, rest.ids_TK], 1))
    logprobs_TK = torch.cat([head.logprobs_TK, rest.logprobs_TK + log_rest_T[:, None]], 1).gather(1, order_TK)
    p_TK, rest_T = head.logprobs_TK.double().exp(), log_rest_T.double().exp()
    choice_T = rest_T * (rest_entropy_T.double() - log_rest_T.double())
    entropy_T = choice_T.where(rest_T > 0, 0) - (p_TK * head.logprobs_TK.double()).sum(1)
    empty_TK = ids_TK < 0
    targets = TeacherTargets(
        ids_TK,
        logprobs_TK.masked_fill(empty_TK, -torch.inf),
        torch.full_like(log_rest_T, -torch.inf),
        temperature,
        entropy_T.float(),
    )
    return targets, said


def without(logits_TW: Tensor, ids_TK: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """A copy of the logits in which some ids have probability 0 and yet a finite logit."""
    width = shard.real_width
    if not width:
        return logits_TW
    columns_TK = shard.columns(ids_TK)
    kept_TW = logits_TW[:, :width].float()
    spare_TW = torch.cat([kept_TW, kept_TW[:, :1]], 1)  # the last column takes the ids of other ranks
    spare_TW.scatter_(1, columns_TK.where(columns_TK >= 0, width), -torch.inf)
    kept_TW = spare_TW[:, :width]
    top_T = kept_TW.amax(1, keepdim=True)
    floor_T = torch.where(top_T == -torch.inf, FLOOR, top_T - UNLIKELY * temperature)
    result_TW = logits_TW.float()
    result_TW[:, :width] = torch.maximum(kept_TW, floor_T)
    return result_TW


def sort_entries(ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ascending with -1 last, and where each was."""
    order_TK = ids_TK.where(ids_TK >= 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return ids_TK.gather(1, order_TK), order_TK


def entries_at(logits_TW: Tensor, ids_TK: Tensor, shard: VocabShard, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given ids and of all others together; both summed directly, neither as 1 minus the other.

    Args:
        ids_TK: global ids, unique in a row, the same on every rank; none empty.
    Returns:
        logprobs_TK, log_tail_T: float32, on every rank.
    Collectives: all-gather of 2 floats and all-reduce of K floats per token and rank.
    """
    columns_TK = shard.columns(ids_TK)
    none_T = torch.full_like(ids_TK[:, 0], -1)
    every_T = torch.ones_like(none_T, dtype=torch.bool)
    stats = row_passes(logits_TW).statistics(logits_TW, columns_TK, none_T, every_T, shard.real_width, temperature)
    entry_logits_TK = stats.entry_logits_TK.clone()
    if shard.group is not None:
        dist.all_reduce(entry_logits_TK, dist.ReduceOp.MAX, group=shard.group)
    max_RT, sum_RT = shard.all_gather(torch.stack([stats.max_T, stats.sum_T], 1)).double().unbind(2)
    outside_T = (sum_RT.log() + max_RT.masked_fill(max_RT == -torch.inf, 0) / temperature).logsumexp(0)
    inside_TK = entry_logits_TK.double() / temperature
    all_T = torch.logaddexp(outside_T, inside_TK.logsumexp(1))
    return (inside_TK - all_T[:, None]).float(), (outside_T - all_T).float()


def with_label(ids_TK: Tensor, logprobs_TK: Tensor, labels_T: Tensor) -> Tensor:
    """The ids with the label in place of the least likely entry, the higher id among equals, where it is missing."""
    least_T = logprobs_TK.shape[1] - 1 - logprobs_TK.flip(1).argmin(1)
    missing_T = ~(ids_TK == labels_T[:, None]).any(1)
    ids_TK = ids_TK.clone()
    ids_TK[missing_T, least_T[missing_T]] = labels_T[missing_T]
    return ids_TK.sort(1).values


def reaches(logprobs_TK: Tensor, top_p: float) -> Tensor:
    """Bool [T, K]: the fewest most likely entries, the lower id among equals, whose mass is at least top_p."""
    order_TK = logprobs_TK.argsort(dim=1, descending=True, stable=True)
    mass_TK = logprobs_TK.gather(1, order_TK).double().exp()
    before_TK = mass_TK.cumsum(1) - mass_TK
    return torch.zeros_like(logprobs_TK, dtype=torch.bool).scatter_(1, order_TK, before_TK < top_p)


def drop_entries(
    ids_TK: Tensor, logprobs_XTK: Tensor, log_tail_XT: Tensor, kept_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the mass of entries that are not kept to the tail, at every temperature; empty slots go last."""
    dropped_XTK = logprobs_XTK.double().masked_fill(kept_TK, -torch.inf)
    log_tail_XT = torch.logaddexp(log_tail_XT.double(), dropped_XTK.logsumexp(2)).float()
    order_TK = kept_TK.int().argsort(dim=1, descending=True, stable=True)
    ids_TK = ids_TK.masked_fill(~kept_TK, -1).gather(1, order_TK)
    logprobs_XTK = logprobs_XTK.masked_fill(~kept_TK, -torch.inf).gather(2, order_TK.expand_as(logprobs_XTK))
    return ids_TK, logprobs_XTK, log_tail_XT
