"""select_top_k against a stable sort of the whole row: the same ids at every number of ranks, ties included."""

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import VocabShard, select_top_k
from tests.kernels.dense import cut, dense_targets, draw
from tests.ranks import run_ranks

T, V = 7, 101


def rows_of(kind, vocabulary=V):
    _, teacher, _ = draw(T, vocabulary)
    if kind == "equal":
        teacher = torch.full_like(teacher, 0.5)
    elif kind == "three levels":
        teacher = teacher.sign() * (teacher.abs() > 3)
    elif kind == "ties at the threshold":
        teacher = teacher.bfloat16().round()
    elif kind == "descending":
        teacher = -torch.arange(vocabulary).float().repeat(T, 1)
    return teacher.bfloat16()


KINDS = ["random", "equal", "three levels", "ties at the threshold", "descending"]


def select_all(rank, ranks):
    for kind in KINDS:
        for vocabulary, top_k in [(V, 1), (V, 8), (V, 60), (V, V), (11, 10), (13, 13), (2, 1), (3, 2), (4099, 100)]:
            teacher = rows_of(kind, vocabulary)
            for temperature in (1.0, 2.0):
                teacher_TW, shard = cut(teacher, rank, ranks, garbage=torch.inf)
                untouched = teacher_TW.clone()
                mine = select_top_k(teacher_TW, top_k, shard, temperature)
                whole = select_top_k(teacher_TW, top_k, shard, temperature, gather=True)
                assert torch.equal(teacher_TW, untouched)
                ids, log_p, tail = dense_targets(teacher, top_k, temperature)
                for targets in (mine, whole):
                    targets.check()
                    assert targets.temperature == temperature and targets.ids_TK.shape == (T, top_k)
                    assert_close(targets.log_tail_T.double(), tail, atol=2e-6, rtol=1e-6)
                assert torch.equal(whole.ids_TK, ids), (kind, vocabulary, top_k)
                assert_close(whole.logprobs_TK.double(), log_p, atol=2e-6, rtol=1e-6)
                own = (ids >= shard.start) & (ids < shard.stop)
                count = own.sum(1, keepdim=True)
                slots = torch.arange(top_k) < count
                assert torch.equal(mine.ids_TK[slots], ids[own]) and (mine.ids_TK[~slots] == -1).all()
                assert torch.equal(mine.logprobs_TK[slots], whole.logprobs_TK[own])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_entries_at_every_number_of_ranks(ranks):
    select_all(0, 1) if ranks == 1 else run_ranks(ranks, select_all)


def test_the_tail_is_summed_directly():
    """At a tail of 1e-9, 1 - sum would be all rounding."""
    _, teacher, _ = draw(T, V)
    teacher[:, :8] += 30
    targets = select_top_k(teacher, 8, VocabShard(0, V, V))
    assert_close(targets.log_tail_T.double(), dense_targets(teacher, 8)[2], atol=1e-5, rtol=0)
    assert targets.log_tail_T.max() < -20


def refuse(rank, ranks):
    _, teacher, _ = draw(T, V)
    for place, value in [(0, torch.nan), (V - 1, torch.inf), (V - 1, -torch.inf), (0, -torch.inf)]:
        broken = teacher.clone()
        broken[3, place] = value
        teacher_TW, shard = cut(broken, rank, ranks)
        with pytest.raises(ValueError, match="first in row 3"):
            select_top_k(teacher_TW, 5, shard)
    for top_k in (0, V + 1):
        with pytest.raises(ValueError, match=f"vocabulary of {V}, not {top_k}"):
            select_top_k(teacher_TW, top_k, shard)
    with pytest.raises(ValueError, match="temperature"):
        select_top_k(teacher_TW, 5, shard, -1.0)
    with pytest.raises(ValueError, match="teacher logits must be"):
        select_top_k(teacher_TW[:, 1:], 5, shard)


@pytest.mark.parametrize("ranks", [1, 2])
def test_broken_teachers_are_refused_on_every_rank(ranks):
    refuse(0, 1) if ranks == 1 else run_ranks(ranks, refuse)


def test_uneven_shards(uneven=((0, 50), (50, 101))):
    run_ranks(2, select_uneven, uneven)


def select_uneven(rank, ranks, bounds):
    for kind in KINDS:
        for top_k in (8, 50, 51, 70):
            teacher, (start, stop) = rows_of(kind), bounds[rank]
            shard = VocabShard(start, stop, V, torch.distributed.group.WORLD)
            whole = select_top_k(teacher[:, start:stop], top_k, shard, gather=True)
            assert torch.equal(whole.ids_TK, dense_targets(teacher, top_k)[0])


def test_no_tokens():
    targets = select_top_k(torch.zeros(0, V), 5, VocabShard(0, V, V))
    assert targets.ids_TK.shape == targets.logprobs_TK.shape == (0, 5) and targets.log_tail_T.shape == (0,)
