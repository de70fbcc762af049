"""Choosing the next token over a vocabulary that is split over ranks, without gathering it.

    greedy     the most likely id
    drawn      argmax over ids of z / temperature - log E, E exponential: the Gumbel maximum, which is an exact draw
               from the softmax; each rank looks at its own columns, and the ranks' maxima are merged

E is a function of the row's seed and the id alone, so a draw does not depend on how the vocabulary is split, on the
rows beside it, or on the device. top_k, top_p and min_p leave the ids at or above one logit, which the ranks agree on
first.

Legend: T tokens, W this rank's vocabulary columns, R ranks, M gathered logits of a rank, V gathered logits of all.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.kernels.paths import row_passes
from megakd.kernels.predictions import predict
from megakd.kernels.vocab import MASKED, VocabShard

FIRST_GATHERED = 256  # logits a rank sends for top_p to begin with; a flatter distribution takes more
GOLDEN, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # SplitMix64's constants
LOW_53 = (1 << 53) - 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the next token is chosen; what is left out is applied in this order, as transformers does.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token, whatever the rest says.
        top_k: ids at least as likely as the k-th are kept; None keeps all.
        top_p: of those, the most likely ones that together have this share of their mass, and ids as likely as the
            last of these; None keeps all.
        min_p: of those, ids with at least this share of the most likely one's probability; None keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class Chosen(NamedTuple):
    """Per row, equal on all ranks: int64 ids, and their log-probabilities at temperature 1 over the whole vocabulary
    (float32, nats)."""

    id_T: Tensor
    logprob_T: Tensor


@torch.no_grad()
def choose_next(logits_TW: Tensor, shard: VocabShard, choice: Choice, seed_T: Tensor | None = None) -> Chosen:
    """The next token of every row.

    Args:
        logits_TW: any float dtype; not modified.
        shard: which ids the columns are; columns at or beyond the real vocabulary are left out.
        seed_T: int64, of each row, equal on all ranks; not needed at temperature 0.
    Collectives: all-gathers: 32 B per row and rank at temperature 0, else 40 B; with top_k 4 B more for each of the k,
        with top_p 1 KiB more (where 256 logits a rank do not have the mass, 8 times as many, and so on), with min_p
        8 B more.
    """
    if choice.temperature == 0:
        said = predict(logits_TW, torch.full_like(logits_TW[:, 0], MASKED, dtype=torch.int64), shard)
        return Chosen(said.id_T, said.logprob_T)
    width = shard.real_width
    real_TW = logits_TW[:, :width].float()
    score_TW = real_TW.double() / choice.temperature - exponentials(seed_T, shard.start, width).log_()
    lowest_T = lowest_kept(real_TW, shard, choice)
    if lowest_T is not None:
        score_TW.masked_fill_(real_TW < lowest_T[:, None], -torch.inf)
    if width:
        score_T, column_T = score_TW.max(1)
    else:
        score_T, column_T = (real_TW.new_full(real_TW.shape[:1], x, dtype=torch.float64) for x in (-torch.inf, -1))
        column_T = column_T.long()
    max_T, _, sum_T, logit_T = row_passes(logits_TW).extremes(logits_TW, column_T, width)
    lanes = [score_T, (column_T + shard.start).double(), max_T.double(), sum_T.double(), logit_T.double()]
    score_RT, id_RT, max_RT, sum_RT, logit_RT = shard.all_gather(torch.stack(lanes)).unbind(1)
    best_T = score_RT.argmax(0)[None]
    top_T = max_RT.amax(0)
    lse_T = top_T + (sum_RT * (max_RT - top_T).exp()).sum(0).log()
    return Chosen(id_RT.gather(0, best_T)[0].long(), (logit_RT.gather(0, best_T)[0] - lse_T).float())


def exponentials(seed_T: Tensor, start: int, width: int) -> Tensor:
    """Standard exponential numbers [T, width], float64, of ids start, start + 1, ...; each of its seed and id alone.

    Source: SplitMix64's finaliser (Steele, Lea and Flood 2014) of seed + id * the golden ratio, twice.
    """
    ids_W = torch.arange(start, start + width, device=seed_T.device)
    bits_TW = mix(mix(seed_T)[:, None] + (ids_W + 1) * GOLDEN)
    return bits_TW.bitwise_and_(LOW_53).double().add_(0.5).mul_(-(2.0**-53)).log1p_().neg_()


def mix(x: Tensor) -> Tensor:
    """64 bits that look random, of 64 bits; a new tensor."""
    x = (x ^ _right(x, 30)) * FIRST
    x = (x ^ _right(x, 27)).mul_(SECOND)
    return x.bitwise_xor_(_right(x, 31))


def _right(x: Tensor, bits: int) -> Tensor:
    """Shifted right as an unsigned number."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def lowest_kept(real_TW: Tensor, shard: VocabShard, choice: Choice) -> Tensor | None:
    """The smallest logit, float32 [T], that top_k, top_p and min_p leave; None where they leave all."""
    lowest_T = None
    size, top_p = shard.size, choice.top_p
    if choice.top_k is not None and choice.top_k < size:
        lowest_T = gather_largest(real_TW, shard, choice.top_k)[0][:, choice.top_k - 1]
    if top_p is not None and top_p < 1:
        lowest_T = nucleus(real_TW, shard, choice, lowest_T)
    if choice.min_p is not None and choice.min_p > 0:
        largest_T = gather_largest(real_TW, shard, 1)[0][:, 0]
        least_T = largest_T + choice.temperature * torch.tensor(choice.min_p).log()
        lowest_T = least_T if lowest_T is None else torch.maximum(lowest_T, least_T)
    return lowest_T


def gather_largest(real_TW: Tensor, shard: VocabShard, most: int) -> tuple[Tensor, Tensor]:
    """The largest logits of all ranks, descending [T, V], and the logit below which one may be missing [T].

    Args:
        most: M, how many each rank gives.
    """
    own = min(most, real_TW.shape[1])
    largest_TM = real_TW.new_full((len(real_TW), most), -torch.inf)
    largest_TM[:, :own] = real_TW.topk(own, 1).values
    everyone_RTM = shard.all_gather(largest_TM)
    return everyone_RTM.permute(1, 0, 2).flatten(1).sort(1, descending=True).values, everyone_RTM[:, :, -1].amax(0)


def nucleus(real_TW: Tensor, shard: VocabShard, choice: Choice, lowest_T: Tensor | None) -> Tensor:
    """The logit of the last id of the most likely ones that have top_p of the mass of those at or above `lowest_T`."""
    gathered = min(FIRST_GATHERED if choice.top_k is None else choice.top_k, shard.size)
    kept_TW = real_TW if lowest_T is None else real_TW.masked_fill(real_TW < lowest_T[:, None], -torch.inf)
    while True:
        largest_TV, missing_T = gather_largest(kept_TW, shard, gathered)
        top_T1 = largest_TV[:, :1]
        own_T = ((kept_TW - top_T1).double() / choice.temperature).exp().sum(1)
        wanted_T1 = choice.top_p * shard.all_gather(own_T).sum(0)[:, None]
        mass_TV = ((largest_TV - top_T1).double() / choice.temperature).exp().cumsum(1)
        last_T1 = (mass_TV < wanted_T1).sum(1, keepdim=True).clamp(max=largest_TV.shape[1] - 1)
        found_T = largest_TV.gather(1, last_T1)[:, 0]
        if gathered >= shard.size or bool(((found_T >= missing_T) & (mass_TV[:, -1:] >= wanted_T1)[:, 0]).all()):
            break
        gathered = min(8 * gathered, shard.size)
    return found_T if lowest_T is None else torch.maximum(found_T, lowest_T)
