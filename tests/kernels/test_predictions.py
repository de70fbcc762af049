"""predict: against log_softmax in float64, however the vocabulary is split, with ties and garbage in the padding."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from megakd.kernels import rows, sample_targets, select_top_k
from megakd.kernels.predictions import predict
from megakd.kernels.sampling import sample_and_predict
from megakd.kernels.selection import select_and_predict
from tests.kernels.dense import cut, draw
from tests.kernels.test_kd_loss import count_collectives, on_ranks
from tests.ranks import run_ranks

T, V = 11, 101


def logits_and_labels(dtype):
    logits, _, labels = draw(T, V, dtype=dtype)
    logits[3] = logits[3].round().clamp(-2, 2)  # its largest value many times, in every shard
    logits[4] = 0.0
    logits[5, ::2] = -torch.inf
    logits[6] *= 1e3
    return logits, labels


def check_shard(rank, ranks, dtype):
    logits, labels = logits_and_labels(dtype)
    log_p = logits.double().log_softmax(1)
    mine, shard = cut(logits, rank, ranks)
    got = predict(mine, labels, shard)
    top, first = log_p.max(1)
    assert torch.equal(got.id_T, first)
    assert_close(got.logprob_T.double(), top, atol=1e-6, rtol=1e-6)
    labelled = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0].where(labels >= 0, 0)
    assert_close(got.label_logprob_T.double(), labelled, atol=2e-6, rtol=1e-6)
    everyone = [None] * ranks
    if ranks > 1:
        dist.all_gather_object(everyone, got.label_logprob_T)
        assert all(torch.equal(one, got.label_logprob_T) for one in everyone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1, 6 * 4 * (V + 1), 1 << 20])  # a row, a few, all rows at a time
def test_one_rank(dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", block_bytes)
    check_shard(0, 1, dtype)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards(ranks):
    run_ranks(ranks, check_shard, torch.bfloat16)


def test_a_shard_without_real_columns():
    got = rows.extremes(torch.full((3, 5), torch.nan), torch.full((3,), -1), 0)
    assert got.max_T.isneginf().all() and got.label_logit_T.isneginf().all()
    assert not got.sum_T.any() and not got.column_T.any()


def check_selected(rank, ranks):
    """The selection's own read says what `predict` says: the same ids, and log-probabilities to rounding."""
    logits, labels = logits_and_labels(torch.bfloat16)
    logits[5] = logits[7]  # a teacher is finite
    mine, shard = cut(logits, rank, ranks)
    for top_k in (1, 3, 60, V):
        for temperature in (1.0, 2.0):
            for gather in (False, True):
                targets, said = select_and_predict(mine, labels, top_k, shard, temperature, gather=gather)
                alone = select_top_k(mine, top_k, shard, temperature, gather=gather)
                assert torch.equal(targets.ids_TK, alone.ids_TK) and torch.equal(targets.logprobs_TK, alone.logprobs_TK)
                assert torch.equal(targets.log_tail_T, alone.log_tail_T)
                want = predict(mine, labels, shard)
                assert torch.equal(said.id_T, want.id_T) and said.id_T.dtype == torch.int64
                assert_close(said.logprob_T, want.logprob_T, atol=1e-6, rtol=1e-6)
                assert_close(said.label_logprob_T, want.label_logprob_T, atol=2e-6, rtol=1e-6)
                assert (said.label_logprob_T[labels < 0] == 0).all()
    for temperature, lanes in ((1.0, 6), (2.0, 8)):
        with count_collectives() as sent:
            select_and_predict(mine, labels, 3, shard, temperature)
        assert ranks == 1 or [(dtype, elements) for _, dtype, elements in sent] == [
            (torch.bfloat16, 3 * T), (torch.float32, lanes * T)
        ]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_from_the_read_of_a_selection(ranks):
    on_ranks(ranks, check_selected)


def check_drawn(rank, ranks):
    """So does the read of draws, of which chunks of columns are all that is known."""
    logits, labels = logits_and_labels(torch.bfloat16)
    logits[5] = logits[7]
    for vocabulary in (V, 2, 1):  # the last ranks have no real column
        mine, shard = cut(logits[:, :vocabulary], rank, ranks)
        own = labels.clamp(max=vocabulary - 1)
        for temperature in (1.0, 2.0):
            generators = (torch.Generator().manual_seed(1) for _ in range(2))
            targets, said = sample_and_predict(mine, own, 5, shard, next(generators), temperature, gather=True)
            alone = sample_targets(mine, 5, shard, next(generators), temperature, gather=True)
            for name in ("ids_TK", "logprobs_TK", "entropy_T"):
                assert torch.equal(getattr(targets, name), getattr(alone, name)), name
            want = predict(mine, own, shard)
            assert torch.equal(said.id_T, want.id_T) and said.id_T.dtype == torch.int64
            assert_close(said.logprob_T, want.logprob_T, atol=1e-6, rtol=1e-6)
            assert_close(said.label_logprob_T, want.label_logprob_T, atol=2e-6, rtol=1e-6)
    with count_collectives() as sent:
        sample_and_predict(mine, own, 5, shard, torch.Generator().manual_seed(1))
    assert ranks == 1 or [(dtype, elements) for _, dtype, elements in sent] == [(torch.float64, 7 * T)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_from_the_read_of_draws(ranks):
    on_ranks(ranks, check_drawn)


def test_selection_and_draws_read_the_logits_once(monkeypatch):
    reads = []
    for read in (rows.summarize, rows.extremes, rows.row_blocks):
        counted = functools.wraps(read)(lambda *a, f=read, **named: (reads.append(f.__name__), f(*a, **named))[1])
        monkeypatch.setattr(rows, read.__name__, counted)
    logits, labels = logits_and_labels(torch.bfloat16)
    logits[5] = logits[7]
    mine, shard = cut(logits, 0, 1)
    for temperature in (1.0, 2.0):
        select_and_predict(mine, labels, 3, shard, temperature)
        assert reads == ["summarize"]
        sample_targets(mine, 3, shard, torch.Generator().manual_seed(0), temperature)
        sample_and_predict(mine, labels, 3, shard, torch.Generator().manual_seed(0), temperature)
        assert reads == ["summarize"] * 3
        reads.clear()
