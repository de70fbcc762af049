"""sample_targets: draws from the teacher's whole distribution instead of its K largest entries.

1. `rows.summarize` reads the logits once, and gives the mass and the entropy of each chunk of columns.
2. The ranks' masses are all-gathered. Every rank makes the same uniform numbers and inverts the cumulative
   distribution: which rank, then (on that rank) which chunk, then which column.
3. Draws of one id are merged into one entry.

Sizes: T tokens, N draws per token (and slots for entries), W vocabulary columns on this rank, R ranks, C chunks of
columns, H columns in a chunk.
"""

import torch
from torch import Tensor

from megakd.kernels.checks import expect
from megakd.kernels.paths import row_passes
from megakd.kernels.predictions import Predictions, merge_predictions
from megakd.kernels.selection import expect_finite, join
from megakd.kernels.selection_rows import blocks, gather_chunks, look_up
from megakd.kernels.vocab import VocabShard
from megakd.targets import TeacherTargets


@torch.no_grad()
def sample_targets(
    logits_TW: Tensor,
    draws: int,
    shard: VocabShard,
    generator: torch.Generator,
    temperature: float = 1.0,
    *,
    gather: bool = False,
) -> TeacherTargets:
    """Independent draws from the teacher's full softmax at `temperature`; an entry weighs its share of the draws.

    Cross-entropy and gradient of forward_kl are unbiased for the whole vocabulary; with `entropy_T` so is the value.

    Args:
        logits_TW: the teacher's, float32, bfloat16 or float16, not divided by the temperature. Not modified.
        draws: N >= 1, with replacement.
        generator: on the logits' device, and in the same state on every rank; advances by T * N numbers.
        gather: as in `select_top_k`.
    Returns:
        TeacherTargets with N slots, ids ascending, empty slots last; log-probabilities log(count / N), log_tail_T -inf
        and the exact entropy_T.
    Raises:
        ValueError: draws below 1, shapes that do not fit; logits that are not finite, generators that differ (on CUDA
            the device stops: `checks.expect`).
    Collectives: all-gather of 4 float64 per token and rank; with `gather` also N ids and N floats.
    Source: random sampling knowledge distillation, Anshumann et al. 2025, arXiv:2503.16870.
    """
    targets, _ = draw(logits_TW, None, draws, shard, generator, temperature, gather)
    return targets


@torch.no_grad()
def sample_and_predict(
    logits_TW: Tensor,
    labels_T: Tensor,
    draws: int,
    shard: VocabShard,
    generator: torch.Generator,
    temperature: float = 1.0,
    *,
    gather: bool = False,
) -> tuple[TeacherTargets, Predictions]:
    """`sample_targets` and `predict` of the same logits, which are read once.

    Args:
        labels_T: int64 global ids, -100 for none. The rest as for `sample_targets`.
    Raises:
        ValueError: as `sample_targets`.
    Collectives: those of `sample_targets`, with 7 float64 instead of 4 in the first.
    """
    return draw(logits_TW, labels_T, draws, shard, generator, temperature, gather)


def draw(
    logits_TW: Tensor,
    labels_T: Tensor | None,
    draws: int,
    shard: VocabShard,
    generator: torch.Generator,
    temperature: float,
    gather: bool,
) -> tuple[TeacherTargets, Predictions | None]:
    """The targets, and given labels the predictions."""
    shard.check_logits(logits_TW, "teacher logits")
    if draws < 1 or not 0 < temperature < float("inf"):
        raise ValueError(f"draws must be at least 1 and temperature positive, not {draws} and {temperature}")
    uniform_TN = torch.rand(len(logits_TW), draws, generator=generator, dtype=torch.float64, device=logits_TW.device)
    weights_TC, record_TL = chunk_weights(logits_TW[:, : shard.real_width], labels_T, shard, temperature)
    record_TL[:, 3] = uniform_TN[:, 0]
    top_RT, sum_RT, drift_RT, first_RT, *said = shard.all_gather(record_TL).unbind(2)
    expect_finite(~sum_RT.isnan().any(0))
    if shard.ranks > 1:
        expect(first_RT == first_RT[0], "the ranks' generators differ", refuse_generators)

    highest_T = top_RT.amax(0)
    scale_RT = ((top_RT - highest_T) / temperature).exp()
    ends_RT = (sum_RT * scale_RT).cumsum(0)
    total_T = ends_RT[-1]
    drift_RT = scale_RT * drift_RT + (scale_RT * sum_RT) * (top_RT - highest_T).nan_to_num(neginf=0) / temperature
    entropy_T = total_T.log() - drift_RT.sum(0) / total_T

    point_TN = torch.minimum(uniform_TN * total_T[:, None], _below(total_T)[:, None])
    mine_TN = (ends_RT.T[:, None] <= point_TN[:, :, None]).sum(2) == shard.rank
    start_T = ends_RT[shard.rank - 1] if shard.rank else torch.zeros_like(total_T)
    scale_T = scale_RT[shard.rank]
    inside_TN = ((point_TN - start_T[:, None]) / scale_T[:, None]).where(mine_TN, 0)
    columns_TN = invert(logits_TW[:, : shard.real_width], weights_TC, record_TL[:, 0], inside_TN, temperature)
    ids_TN, logprobs_TN = merge_draws(torch.where(mine_TN, columns_TN + shard.start, -1))
    if gather and shard.ranks > 1:
        ids_TN, logprobs_TN = join(shard.all_gather(ids_TN), shard.all_gather(logprobs_TN))
    log_tail_T = torch.full_like(total_T, -torch.inf, dtype=torch.float32)
    targets = TeacherTargets(ids_TN, logprobs_TN, log_tail_T, temperature, entropy_T.float())
    return targets, None if labels_T is None else merge_predictions(top_RT, *said, labels_T)


def refuse_generators() -> None:
    """Raises ValueError."""
    raise ValueError("the ranks' generators differ; seed them alike on all ranks that share a vocabulary")


def chunk_weights(
    logits_TW: Tensor, labels_T: Tensor | None, shard: VocabShard, temperature: float
) -> tuple[Tensor, Tensor]:
    """Mass of each chunk relative to the row's largest logit, and this rank's record; float64.

    Record: the largest logit; sum of e = exp((x - largest) / temperature), NaN in a broken row; sum of
    e (x - largest) / temperature; one lane free. With labels three more: the id of the largest logit, the lowest among
    equals; sum of exp(x - largest); the label's logit, -inf where it is another rank's.
    """
    tokens, width = logits_TW.shape
    chunks = max(1, min(width, round(width**0.5 / 16) * 16 or 16))  # of 16, neighbours are loaded together
    weights_TC = torch.zeros((tokens, chunks), dtype=torch.float64, device=logits_TW.device)
    record_TL = weights_TC.new_zeros((tokens, 4 if labels_T is None else 7))
    record_TL[:, 0] = -torch.inf
    wanted = dict(drift=True, column=labels_T is not None, at_one=labels_T is not None and temperature != 1)
    for block in blocks(logits_TW):
        summary = row_passes(logits_TW).summarize(logits_TW[block], width, chunks, temperature, **wanted)
        top_T = summary.max_TC.amax(1)
        below_TC = (summary.max_TC - top_T[:, None]).double()
        gap_TC = below_TC / temperature
        scale_TC = gap_TC.exp()
        weights_TC[block] = scale_TC * summary.sum_TC
        record_TL[block, 0], record_TL[block, 1] = top_T.double(), weights_TC[block].sum(1)
        record_TL[block, 2] = (scale_TC * summary.drift_TC + weights_TC[block] * gap_TC).sum(1)
        if labels_T is not None:
            sum_TC = summary.sum_TC if temperature == 1 else summary.sum_at_one_TC
            first_T = summary.column_TC.masked_fill(below_TC < 0, width).amin(1)
            record_TL[block, 4], record_TL[block, 5] = first_T + shard.start, (below_TC.exp() * sum_TC).sum(1)
    if labels_T is not None:
        record_TL[:, 6] = look_up(logits_TW, shard.columns(labels_T)[:, None])[:, 0]
    return weights_TC, record_TL


def invert(logits_TW: Tensor, weights_TC: Tensor, top_T: Tensor, inside_TN: Tensor, temperature: float) -> Tensor:
    """The column in which each point of this rank's cumulative mass (in the units of `weights_TC`) falls; [T, N]."""
    chunks = weights_TC.shape[1]
    columns_TN = torch.zeros_like(inside_TN, dtype=torch.int64)
    height = -(-logits_TW.shape[1] // max(1, chunks))
    for block in blocks(logits_TW, row_bytes=max(1, 32 * inside_TN.shape[1] * height)):
        ends_TC = weights_TC[block].cumsum(1)
        point_TN = torch.minimum(inside_TN[block], _below(ends_TC[:, -1:]))
        chunk_TN = torch.searchsorted(ends_TC, point_TN.contiguous(), right=True)
        weight_TN = weights_TC[block].gather(1, chunk_TN)
        share_TN = (point_TN - (ends_TC.gather(1, chunk_TN) - weight_TN)).clamp(min=0) / weight_TN
        x_TNH = gather_chunks(logits_TW[block], chunk_TN, chunks).transpose(1, 2)
        ends_TNH = ((x_TNH - top_T[block, None, None]) / temperature).double().exp().cumsum(2)
        point_TN = torch.minimum(share_TN * ends_TNH[:, :, -1], _below(ends_TNH[:, :, -1]))
        columns_TN[block] = chunk_TN + chunks * (ends_TNH <= point_TN[:, :, None]).sum(2)
    return columns_TN


def merge_draws(ids_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ascending, each once, then -1; and the log of each one's share of the N draws. -1 is another rank's draw."""
    tokens, draws = ids_TN.shape
    absent = torch.iinfo(torch.int64).max
    sorted_TN = ids_TN.where(ids_TN >= 0, absent).sort(1).values
    fresh_TN = torch.ones_like(sorted_TN, dtype=torch.bool)
    fresh_TN[:, 1:] = sorted_TN[:, 1:] != sorted_TN[:, :-1]
    slot_TN = fresh_TN.long().cumsum(1) - 1
    count_TN = torch.zeros((tokens, draws), device=ids_TN.device).scatter_add_(
        1, slot_TN, (sorted_TN != absent).float()
    )
    merged_TN = torch.full_like(ids_TN, -1).scatter_(1, slot_TN, sorted_TN)
    return merged_TN.where(count_TN > 0, -1), (count_TN / draws).log()


def _below(x: Tensor) -> Tensor:
    """The next smaller number: a point of a cumulative distribution must lie before its end."""
    return torch.nextafter(x, torch.zeros_like(x))
