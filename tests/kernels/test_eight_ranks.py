"""Losses and selection at TP 8, most of whose shards hold no real column, against dense float64: value and gradient.

make test-nightly       # also every case of the other files here, on eight ranks
"""

import pytest
import torch
from torch.testing import assert_close

from megakd.divergences import PARAMETERS
from megakd.kernels import dense_kd_loss, kd_loss, linear_kd_loss, linear_select_top_k, sample_targets, select_top_k
from megakd.kernels.divergences import FORMS
from tests.kernels import test_dense, test_kd_loss, test_sampling, test_selection
from tests.kernels.dense import PAIRS, cut, dense_divergence, dense_loss, dense_targets, draw
from tests.ranks import run_ranks

RANKS = 8
T, V, H, K = 7, 11, 5, 3  # two columns a rank: the sixth has one that is real, the last two none
MIX = {"beta": 0.2, "skew": 0.7, "alpha": 0.3}


def weighted(outputs, weight_T):
    (outputs.loss_T * weight_T).sum().backward()


def compare_everything(rank, ranks):
    """Returns how many real columns this rank has."""
    student_TV, teacher_TV, labels_T = draw(T, V, seed=7)
    labels_T[T // 2] = 4
    weight_T = torch.arange(1.0, T + 1)
    generator = torch.Generator().manual_seed(5)
    hidden_TH, weight_VH = torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator)
    logits_of = {"given": student_TV.double(), "linear": hidden_TH.double() @ weight_VH.double().T}
    teacher_TW, shard = cut(teacher_TV, rank, ranks)
    weight_WH = cut(weight_VH.T, rank, ranks)[0].T.contiguous()
    mine = slice(shard.start, shard.start + shard.real_width)

    def check_given(loss, targets, want_T, leaf_TV, **options):
        student_TW = cut(student_TV, rank, ranks)[0].requires_grad_()
        got = loss(student_TW, targets, labels_T, shard, **options)
        weighted(got, weight_T)
        (grad_TV,) = torch.autograd.grad((want_T * weight_T).sum(), leaf_TV)
        assert_close(got.loss_T.double(), want_T.detach(), atol=1e-5, rtol=1e-5)
        assert_close(student_TW.grad[:, : shard.real_width].double(), grad_TV[:, mine], atol=1e-4, rtol=1e-5)
        assert (student_TW.grad[:, shard.real_width :] == 0).all()

    def check_linear(targets, entries, **options):
        hidden, weight = (x.clone().requires_grad_() for x in (hidden_TH, weight_WH))
        weighted(linear_kd_loss(hidden, weight, targets, labels_T, shard, block_tokens=3, **options), weight_T)
        hidden64, weight64 = (x.double().requires_grad_() for x in (hidden_TH, weight_VH))
        want_T = dense_loss(hidden64 @ weight64.T, *entries, labels_T, temperature=2.0, **options)[0]
        (want_T * weight_T).sum().backward()
        assert_close(hidden.grad.double(), hidden64.grad, atol=1e-4, rtol=1e-5)
        assert_close(weight.grad[: shard.real_width].double(), weight64.grad[mine], atol=1e-4, rtol=1e-5)

    entries = dense_targets(teacher_TV, K, 2.0)
    whole = select_top_k(teacher_TW, K, shard, 2.0, gather=True)
    assert torch.equal(whole.ids_TK, entries[0])
    own = select_top_k(teacher_TW, K, shard, 2.0)
    for divergence, tail in PAIRS:
        options = dict(divergence=divergence, tail=tail, ce_weight=0.3, **MIX)
        for targets in (own, whole):
            leaf_TV = logits_of["given"].clone().requires_grad_()
            want_T = dense_loss(leaf_TV, *entries, labels_T, temperature=2.0, **options)[0]
            check_given(kd_loss, targets, want_T, leaf_TV, **options)
        check_linear(own, entries, **options)
    for divergence in FORMS:
        leaf_TV = logits_of["given"].clone().requires_grad_()
        p, q = (teacher_TV.double() / 2).softmax(1), (leaf_TV / 2).softmax(1)
        kd_T = dense_divergence(divergence, p, q, *(MIX[name] for name in PARAMETERS))
        ce_T = torch.nn.functional.cross_entropy(leaf_TV, labels_T, reduction="none")
        options = dict(divergence=divergence, temperature=2.0, ce_weight=0.3, **MIX)
        check_given(dense_kd_loss, teacher_TW, 4 * kd_T + 0.3 * ce_T, leaf_TV, **options)
    drawn = sample_targets(teacher_TW, 9, shard, torch.Generator().manual_seed(3), 2.0, gather=True)
    leaf_TV = logits_of["given"].clone().requires_grad_()
    w_TV = torch.zeros(T, V + 1, dtype=torch.float64)
    w_TV.scatter_(1, drawn.ids_TK.where(drawn.ids_TK >= 0, V), drawn.logprobs_TK.double().exp())
    log_q = (leaf_TV / 2).log_softmax(1)
    check_given(kd_loss, drawn, 4 * (-drawn.entropy_T.double() - (w_TV[:, :V] * log_q).sum(1)), leaf_TV)
    linear = linear_select_top_k(hidden_TH, weight_WH, K, shard, 2.0, gather=True, block_tokens=3)
    assert torch.equal(linear.ids_TK, dense_targets(logits_of["linear"], K, 2.0)[0])
    return shard.real_width


@pytest.mark.nightly
def test_everything_where_shards_hold_no_real_column():
    assert run_ranks(RANKS, compare_everything) == [2, 2, 2, 2, 2, 1, 0, 0]


CASES = {
    "kd_loss": (test_kd_loss.compare_all, "kd_loss", torch.float32),
    "kd_loss, hard": (test_kd_loss.compare_hard, "kd_loss"),
    "selection": (test_selection.select_all,),
    "dense": (test_dense.compare_all, torch.float32),
    "dense, hard": (test_dense.compare_hard,),
    "sampled": (test_sampling.means_are_exact, 2.0),
    "sampled, hard": (test_sampling.hard_cases,),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_what_holds_on_four_ranks_holds_on_eight(name):
    run_ranks(RANKS, *CASES[name], timeout_seconds=280)
