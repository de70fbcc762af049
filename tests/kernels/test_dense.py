"""dense_kd_loss and its gradient against the dense float64 definition, on 1, 2 and 4 ranks."""

import math

import pytest
import torch
from torch.testing import assert_close

from megakd.divergences import PARAMETERS
from megakd.kernels import VocabShard, dense_kd_loss
from megakd.kernels.divergences import FORMS
from tests.kernels.dense import cut, dense_divergence, draw
from tests.kernels.test_kd_loss import count_collectives, on_ranks

T, V = 7, 101


def compare(rank, ranks, student_TV, teacher_TV, labels_T, *, atol, **options):
    """Loss, its parts and the gradient of this rank's shard against the definition; returns the outputs."""
    on_T = labels_T != -100
    (student_TW, shard), (teacher_TW, _) = cut(student_TV, rank, ranks), cut(teacher_TV, rank, ranks)
    student_TW[~on_T] = teacher_TW[~on_T] = torch.nan
    untouched = teacher_TW.clone()
    whole = student_TW.requires_grad_() * 1
    outputs = dense_kd_loss(whole, teacher_TW, labels_T, shard, **options)
    weight_T = torch.arange(1.0, len(labels_T) + 1)
    (outputs.loss_T * weight_T).sum().backward()
    assert torch.equal(teacher_TW.nan_to_num(7), untouched.nan_to_num(7))
    assert torch.equal(whole.nan_to_num(7), student_TW.nan_to_num(7)) != options.get("inplace_backward", False)

    truth_TV = student_TV.double().requires_grad_()
    teachers, weights = options.get("temperature", 1.0), (options.get("kd_weight", 1.0), options.get("ce_weight", 0.0))
    students = options.get("student_temperature", teachers)
    p, q = (teacher_TV[on_T].double() / teachers).softmax(1), (truth_TV[on_T] / students).softmax(1)
    kd = dense_divergence(options["divergence"], p, q, *(options.get(*pair) for pair in PARAMETERS.items()))
    ce = torch.nn.functional.cross_entropy(truth_TV[on_T], labels_T[on_T], reduction="none")
    loss = weights[0] * students**2 * kd + weights[1] * ce
    (loss * weight_T[on_T]).sum().backward()
    for got_T, want_T in zip(outputs, (loss, kd, ce, torch.ones_like(kd), torch.ones_like(kd)), strict=True):
        assert (got_T[~on_T] == 0).all()
        assert_close(got_T[on_T].double(), want_T.detach(), atol=atol, rtol=1e-5)
    want_grad, width = truth_TV.grad[:, shard.start : shard.start + shard.real_width], shard.real_width
    rounding = torch.finfo(student_TV.dtype).eps if student_TV.dtype != torch.float32 else 1e-5
    assert_close(student_TW.grad[:, :width].double(), want_grad, atol=10 * atol, rtol=rounding)
    assert (student_TW.grad[:, width:] == 0).all() and (student_TW.grad[~on_T] == 0).all()
    return [part.detach() for part in outputs]


def compare_all(rank, ranks, dtype):
    outputs = []
    for divergence in FORMS:
        for temperatures in [dict(), dict(temperature=2.0), dict(temperature=1.5, student_temperature=3.0)]:
            for weights in [dict(), dict(ce_weight=0.3), dict(kd_weight=0.0, ce_weight=1.0)]:
                options = dict(divergence=divergence, beta=0.2, skew=0.7, alpha=0.3, **temperatures, **weights)
                for in_place in (False, True):
                    data = draw(T, V, dtype=dtype)
                    outputs += compare(rank, ranks, *data, atol=1e-5, inplace_backward=in_place, **options)
    return torch.stack(outputs)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_divergence_temperature_and_weight_is_the_definition(ranks, dtype):
    first, *others = on_ranks(ranks, compare_all, dtype)
    assert all(torch.equal(first, other) for other in others)


def compare_hard(rank, ranks):
    for divergence in FORMS:
        for tokens, vocabulary in [(1, 1), (2, 2), (0, 5), (3, 4099)]:
            compare(rank, ranks, *draw(tokens, vocabulary), divergence=divergence, ce_weight=0.3, atol=1e-5)
        for height in (200.0, 300.0):
            student, teacher, labels = draw(T, V)
            student.scatter_(1, teacher.argmin(1, keepdim=True), height)
            compare(rank, ranks, student, teacher, labels, divergence=divergence, atol=2e-5)
            teacher.scatter_(1, student.argmin(1, keepdim=True), height)
            compare(rank, ranks, student, teacher, labels, divergence=divergence, atol=4e-5)
        student, teacher, labels = draw(T, V)
        masked = torch.full_like(labels, -100)
        compare(rank, ranks, student, teacher, masked, divergence=divergence, atol=0)
        equal = compare(rank, ranks, teacher, teacher, labels, divergence=divergence, atol=2e-6)
        assert equal[1].abs().max() < 2e-6


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_peaks_tiny_vocabularies_and_no_rows(ranks):
    on_ranks(ranks, compare_hard)


def compare_far_apart(rank, ranks):
    """Each model is certain of another id by 1e4: too far for float64 probabilities, so the truth is in logs."""
    (student, teacher), labels = torch.full((2, T, V), -1e4), torch.arange(T)
    student[:, 3], teacher[:, V - 1] = 1e4, 1e4
    for divergence in FORMS:
        (student_TW, shard), (teacher_TW, _) = cut(student, rank, ranks), cut(teacher, rank, ranks)
        student_TW.requires_grad_()
        loss = dense_kd_loss(student_TW, teacher_TW, labels, shard, divergence=divergence, ce_weight=1.0)
        loss.loss_T.sum().backward()
        want = {"jsd": math.log(2), "alpha": 4.0, "tvd": 1.0, "forward_kl": 2e4, "reverse_kl": 2e4}
        want = want.get(divergence, math.log(10))
        assert_close(loss.kd_T, torch.full((T,), want), rtol=1e-5, atol=1e-5)
        assert_close(loss.ce_T, 2e4 * (labels != 3), rtol=1e-6, atol=0)
        assert student_TW.grad.isfinite().all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_models_certain_of_different_ids(ranks):
    on_ranks(ranks, compare_far_apart)


@pytest.mark.parametrize("divergence", [name for name in FORMS if name != "forward_kl"])
def test_what_a_student_rules_out_is_as_good_as_what_it_finds_absurd(divergence):
    results = []
    student, teacher, labels = draw(T, V)
    teacher[0, :50] = -300.0  # no mass in float32 on what both rule out
    for least in (-torch.inf, -1e4):
        leaf = student.index_fill(1, torch.arange(3, 40, 4), least).requires_grad_()
        loss = dense_kd_loss(leaf, teacher, torch.full_like(labels, 1), VocabShard(0, V, V), divergence=divergence)
        loss.loss_T.sum().backward()
        results.append((loss.kd_T, leaf.grad))
    assert results[0][1].isfinite().all()
    assert_close(*results, rtol=1e-6, atol=1e-7)


def refuse_and_count(rank, ranks):
    student, teacher, labels = draw(T, V)
    (student_TW, shard), (teacher_TW, _) = cut(student, rank, ranks), cut(teacher, rank, ranks)
    with pytest.raises(ValueError, match="teacher logits must be"):
        dense_kd_loss(student_TW, teacher_TW[:, 1:], labels, shard)
    with pytest.raises(ValueError, match="agree in the number of tokens"):
        dense_kd_loss(student_TW, teacher_TW[1:], labels, shard)
    with pytest.raises(ValueError, match="temperatures must be"):
        dense_kd_loss(student_TW, teacher_TW, labels, shard, temperature=0.0)
    with pytest.raises(ValueError, match="divergence must be one of"):
        dense_kd_loss(student_TW, teacher_TW, labels, shard, divergence="mse")
    with pytest.raises(ValueError, match="label 101 in row 0"):
        dense_kd_loss(student_TW, teacher_TW, torch.full_like(labels, V), shard)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken, _ = cut(teacher.index_fill(1, torch.tensor([V - 1]), value), rank, ranks)
        with pytest.raises(ValueError, match="NaN or infinity in 6 of 7 rows, first in row 0"):
            dense_kd_loss(student_TW, broken, labels, shard)
    traffic = {}
    for divergence in ("forward_kl", "jsd"):
        with count_collectives() as sent:
            loss = dense_kd_loss(student_TW.requires_grad_(), teacher_TW, labels, shard, divergence=divergence)
            forward = list(sent)
            loss.loss_T.sum().backward()
            assert sent == forward  # nothing in the backward
        traffic[divergence] = [(dtype, elements) for _, dtype, elements in forward]
    if ranks > 1:
        assert traffic["forward_kl"] == [(torch.float32, 7 * T)]
        assert traffic["jsd"] == [(torch.float32, 7 * T), (torch.float32, 2 * T)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_refusals_and_traffic(ranks):
    on_ranks(ranks, refuse_and_count)


def test_in_place_and_twice():
    student, teacher, labels = draw(T, V)
    shard = VocabShard(0, V, V)
    whole = student.requires_grad_() * 1
    loss = dense_kd_loss(whole, teacher, labels, shard, inplace_backward=True).loss_T.sum()
    loss.backward(retain_graph=True)
    assert torch.equal(whole, student.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
