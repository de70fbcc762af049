"""choose_next: against transformers' own filters and the softmax, and the same however the vocabulary is split."""

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels.next_tokens import Choice, choose_next, exponentials, lowest_kept
from megakd.kernels.vocab import VocabShard
from tests.kernels.dense import cut, draw
from tests.kernels.test_kd_loss import on_ranks
from tests.ranks import run_ranks

T, V = 13, 101
CHOICES = [
    Choice(1.0),
    Choice(0.7, top_k=7),
    Choice(1.3, top_p=0.8),
    Choice(1.0, min_p=0.1),
    Choice(0.9, top_k=40, top_p=0.9, min_p=0.02),
    Choice(1.0, top_k=V + 9, top_p=0.999999),
]


def logits_of(dtype):
    logits, _, _ = draw(T, V, dtype=dtype)
    logits[3] = logits[3].round().clamp(-2, 2)  # ties, in every shard
    logits[4] = 0.0
    logits[5, ::2] = -torch.inf
    return logits


def kept_by_transformers(logits, choice):
    """bool [T, V], by its own classes."""
    from transformers.generation import logits_process

    scores = logits.float() / choice.temperature
    for name, value in (("TopK", choice.top_k), ("TopP", choice.top_p), ("MinP", choice.min_p)):
        if value is not None:
            scores = getattr(logits_process, f"{name}LogitsWarper")(value)(None, scores)
    return scores > -torch.inf


@pytest.mark.parametrize("choice", CHOICES[1:], ids=str)
def test_what_is_left_is_what_transformers_leaves(choice):
    logits = logits_of(torch.float32)
    lowest_T = lowest_kept(logits, VocabShard(0, V, V), choice)
    kept_TV = (logits >= lowest_T[:, None]) & (logits > -torch.inf)
    wanted_TV = kept_by_transformers(logits, choice)
    tied = [3, 4]  # there transformers' top-p cuts between equals; here they are all kept
    assert (kept_TV[tied] | ~wanted_TV[tied]).all()
    rows = [row for row in range(T) if row not in tied]
    assert torch.equal(kept_TV[rows], wanted_TV[rows])


def check_shard(rank, ranks, dtype):
    logits = logits_of(dtype)
    mine, shard = cut(logits, rank, ranks)
    seed_T = torch.arange(T) * 7919 - 5
    for choice in (*CHOICES, Choice(0.0)):
        whole = choose_next(logits, VocabShard(0, V, V), choice, seed_T)
        got = choose_next(mine, shard, choice, seed_T)
        assert torch.equal(got.id_T, whole.id_T), choice
        assert_close(got.logprob_T, whole.logprob_T, atol=1e-6, rtol=1e-6)
        log_p = logits.double().log_softmax(1).gather(1, got.id_T[:, None])[:, 0]
        assert_close(got.logprob_T.double(), log_p, atol=1e-6, rtol=1e-6)
        if choice.temperature == 0:
            assert torch.equal(got.id_T, logits.float().max(1).indices)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards(ranks, dtype):
    on_ranks(ranks, check_shard, dtype)


@pytest.mark.parametrize(
    "choice", [Choice(1.0), Choice(0.5), Choice(1.7, top_p=0.7), Choice(1.0, top_k=5), Choice(0.8, min_p=0.05)], ids=str
)
def test_draws_follow_the_softmax(choice):
    """Chi-square over the ids that are left, each of 20,011 seeds once: the statistic below its 99.99 % quantile."""
    draws, width = 20_011, 23
    logits = torch.randn(1, width, generator=torch.Generator().manual_seed(11)) * 1.5
    shard = VocabShard(0, width, width)
    got = choose_next(logits.expand(draws, width), shard, choice, torch.arange(draws))
    lowest_T = lowest_kept(logits, shard, choice)
    z = logits[0].double() / choice.temperature
    left = torch.ones(width, dtype=torch.bool) if lowest_T is None else logits[0] >= lowest_T
    p = z.masked_fill(~left, -torch.inf).softmax(0)
    counts = torch.bincount(got.id_T, minlength=width).double()
    assert not counts[~left].any()
    expected = p[left] * draws
    statistic = float(((counts[left] - expected).square() / expected).sum())
    freedom = int(left.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    assert statistic < bound, (statistic, bound)


def test_a_flat_distribution_takes_more_than_the_first_logits():
    width = 3001
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(2)) * 0.01
    choice = Choice(1.0, top_p=0.6)
    lowest_T = lowest_kept(logits, VocabShard(0, width, width), choice)
    assert torch.equal(logits >= lowest_T[:, None], kept_by_transformers(logits, choice))


def test_numbers_are_exponential_and_uncorrelated():
    sample = exponentials(torch.arange(199), 5, 997)
    assert abs(float(sample.mean()) - 1) < 4 / (199 * 997) ** 0.5
    assert abs(float(sample.var()) - 1) < 4 * 8**0.5 / (199 * 997) ** 0.5
    uniform = (-sample).exp() - 0.5
    for other in (uniform.roll(1, 0), uniform.roll(1, 1), uniform.roll((1, 1), (0, 1))):
        assert abs(float((uniform * other).mean()) * 12) < 4 / (199 * 997) ** 0.5
    assert torch.equal(exponentials(torch.arange(199), 7, 11), sample[:, 2:13])


def test_a_shard_without_real_columns():
    run_ranks(2, check_padding_alone)


def check_padding_alone(rank, ranks):
    import torch.distributed as dist

    logits = logits_of(torch.float32)
    shard = VocabShard(rank * V, (rank + 1) * V, V, dist.group.WORLD)
    mine = logits if rank == 0 else torch.full_like(logits, torch.nan)
    for choice in (*CHOICES, Choice(0.0)):
        got = choose_next(mine, shard, choice, torch.arange(T))
        assert torch.equal(got.id_T, choose_next(logits, VocabShard(0, V, V), choice, torch.arange(T)).id_T)
