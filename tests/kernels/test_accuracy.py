"""How wrong a kernel may be: no more than PyTorch in the same dtype, both against float64; and the same on 8 ranks."""

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import (
    VocabShard,
    dense_kd_loss,
    kd_loss,
    linear_kd_loss,
    linear_select_top_k,
    sample_targets,
    select_top_k,
)
from megakd.targets import TeacherTargets
from tests.kernels.dense import PAIRS, cut, dense_loss, dense_targets, draw
from tests.kernels.test_kd_loss import on_ranks
from tests.kernels.threads import run_threads

T = 5
SIZES = [(1, 1), (101, 1), (101, 8), (101, 100), (101, 101), (127, 8), (127, 127), (128, 8), (128, 100), (128, 128),
         (129, 1), (129, 8), (129, 129), (4099, 1), (4099, 8), (4099, 100), (4099, 4099)]  # fmt: skip
FORMS = ("kd_loss", "linear_kd_loss", "dense_kd_loss")


def run(form, student_TV, teacher_TV, targets, labels_T, shard, *, divergence, tail, temperature, **options):
    """loss_T and the gradient of the logits; for the fused layer with the identity as hidden states, or none of it."""
    leaf = student_TV.clone().requires_grad_()
    if form == "dense_kd_loss":
        outputs = dense_kd_loss(
            leaf, teacher_TV, labels_T, shard, divergence=divergence, temperature=temperature, **options
        )
    elif form == "kd_loss":
        outputs = kd_loss(leaf, targets, labels_T, shard, divergence=divergence, tail=tail, **options)
    else:  # logits = 1 * logits: the weight is the logits' transpose
        hidden = torch.eye(len(leaf), dtype=leaf.dtype)
        weight = student_TV.T.contiguous().requires_grad_()
        outputs = linear_kd_loss(hidden, weight, targets, labels_T, shard, divergence=divergence, tail=tail,
                                 block_tokens=2, **options)  # fmt: skip
    outputs.loss_T.sum().backward()
    return outputs.loss_T.detach(), leaf.grad if form != "linear_kd_loss" else weight.grad.T


def plain(student_TV, teacher_TV, top_k, labels_T, dtype, **options):
    """The same by autograd in one dtype."""
    leaf = student_TV.to(dtype, copy=True).requires_grad_()
    ids, log_p, log_tail = dense_targets(teacher_TV, top_k, options["temperature"])
    loss_T = dense_loss(leaf, ids, log_p.to(dtype), log_tail.to(dtype), labels_T, **options)[0]
    loss_T.sum().backward()
    return loss_T.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary, top_k", SIZES)
def test_no_worse_than_pytorch_in_the_same_dtype(dtype, vocabulary, top_k):
    student, teacher, labels = (x if x.dtype == torch.int64 else x.to(dtype) for x in draw(T, vocabulary, seed=7))
    labels = labels.clamp(min=0)
    shard = VocabShard(0, vocabulary, vocabulary)
    for divergence, tail in PAIRS if vocabulary < 1000 else PAIRS[:1] + PAIRS[4:5]:
        for temperature in (1.0, 2.0):
            options = dict(divergence=divergence, tail=tail, temperature=temperature, ce_weight=0.3)
            targets = select_top_k(teacher, top_k, shard, temperature)
            truth = plain(student, teacher, top_k, labels, torch.float64, **options)
            theirs = plain(student, teacher, top_k, labels, dtype, **options)
            whole = top_k == vocabulary and tail == "bucket"
            for form in FORMS if whole else FORMS[:2]:
                ours = run(form, student, teacher, targets, labels, shard, **options)
                for what, our, their, true in zip(("loss", "gradient"), ours, theirs, truth, strict=True):
                    error, allowed = ((x.double() - true).square().mean().sqrt() for x in (our, their))
                    scale = true.square().mean().sqrt() + 1
                    # float32 PyTorch may be lucky to be exact: a few roundings are free
                    free = 4 * torch.finfo(torch.float32).eps * scale * temperature**2
                    assert error <= allowed.nan_to_num(nan=torch.inf) + free, (form, what, options, error, allowed)


def shard_gradients(rank, ranks, dtype):
    """The gradients of this rank's shard, and the losses, of every divergence and form."""
    student, teacher, labels = draw(7, 101, dtype=dtype)
    (student_TW, shard), (teacher_TW, _) = cut(student, rank, ranks), cut(teacher, rank, ranks)
    return gradients_of_a_shard(shard, student_TW, teacher_TW, labels)


def gradients_of_a_shard(shard, student_TW, teacher_TW, labels):
    losses, grads = [], []
    for divergence, tail in PAIRS:
        for temperature in (1.0, 2.0):
            targets = select_top_k(teacher_TW, 8, shard, temperature)
            for form in FORMS[::2]:
                kind = dict(divergence=divergence, tail=tail, temperature=temperature, ce_weight=0.3)
                loss_T, grad_TW = run(form, student_TW, teacher_TW, targets, labels, shard, **kind)
                losses.append(loss_T)
                grads.append(grad_TW[:, : shard.real_width])
    return torch.stack(losses), torch.stack(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_agree_at_every_number_of_ranks(dtype):
    """1, 2 and 4 processes and 8 threads; the losses are the same bits on all ranks of one run."""
    student, teacher, labels = draw(7, 101, dtype=dtype)
    results = {ranks: on_ranks(ranks, shard_gradients, dtype) for ranks in (1, 2, 4)}
    results[8] = run_threads(8, (student, teacher), lambda *columns: gradients_of_a_shard(*columns, labels))
    (losses_1, grads_1), *_ = results[1]
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
    for ranks, shards in results.items():
        assert all(torch.equal(losses, shards[0][0]) for losses, _ in shards), ranks
        assert_close(shards[0][0], losses_1, atol=1e-5, rtol=1e-5)
        assert_close(torch.cat([grads for _, grads in shards], 2), grads_1, atol=2e-6, rtol=eps)


def test_eight_ranks_share_what_one_rank_finds():
    """Selection with ties, sampling and the fused layer, on 8 threads, some of which hold nothing but padding."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, 5, generator=generator)
    weight_HV = torch.randn(5, 41, generator=generator)
    teacher = (hidden @ weight_HV).round()
    labels = torch.tensor([1, 7, -100, 40, 0, 22])
    whole = VocabShard(0, 41, 41)

    def work(shard, teacher_TW, weight_HW, student_HW):
        targets = select_top_k(teacher_TW, 9, shard, gather=True)
        drawn = sample_targets(teacher_TW, 30, shard, torch.Generator().manual_seed(1), gather=True)
        drawn.check()
        head = weight_HW.T.contiguous().nan_to_num(0)
        fused = linear_select_top_k(hidden, head, 9, shard, block_tokens=4, gather=True)
        student, states = student_HW.T.contiguous().requires_grad_(), hidden.clone().requires_grad_()
        loss_T = linear_kd_loss(states, student, targets, labels, shard, ce_weight=0.3, block_tokens=4).loss_T
        loss_T.sum().backward()
        return targets, drawn, fused, loss_T.detach(), states.grad, student.grad[: shard.real_width]

    student = torch.randn(5, 41, generator=generator)
    eight = run_threads(8, (teacher, weight_HV, student), work, padding=20)
    one = work(whole, teacher, weight_HV, student)
    for rank in eight:
        assert torch.equal(rank[0].ids_TK, dense_targets(teacher, 9)[0])
        assert torch.equal(rank[0].ids_TK, one[0].ids_TK) and torch.equal(rank[2].ids_TK, one[2].ids_TK)
        assert torch.equal(rank[1].ids_TK, eight[0][1].ids_TK) and torch.equal(rank[3], eight[0][3])
        assert_close(rank[0].log_tail_T, one[0].log_tail_T)
        assert_close(rank[1].entropy_T, one[1].entropy_T)
        assert_close(rank[4], one[4], atol=1e-5, rtol=1e-5)
    assert_close(eight[0][3], one[3])
    assert_close(torch.cat([rank[5] for rank in eight]), one[5], atol=1e-5, rtol=1e-5)


def everything(divergence, temperature):
    student, teacher, labels = draw(7, 101)
    shard = VocabShard(0, 101, 101)
    targets = select_top_k(teacher, 8, shard, temperature)
    drawn = sample_targets(teacher, 8, shard, torch.Generator().manual_seed(0), temperature)
    kind = dict(divergence=divergence, tail="bucket", temperature=temperature, ce_weight=0.3)
    parts = [x for form in FORMS for x in run(form, student, teacher, targets, labels, shard, **kind)]
    for each in (targets, drawn):
        parts += [each.ids_TK, each.logprobs_TK, each.log_tail_T]
    return parts


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_nothing_is_read_before_it_is_written(divergence):
    """torch.empty gives NaN here, and the results do not change."""
    want = everything(divergence, 2.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        got = everything(divergence, 2.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("tail_mass", [1e-7, 1e-20])
def test_teachers_who_are_nearly_certain(tail_mass):
    """Entries of mass 1 - 1e-7 and less outside: the tail is compared, not lost in the rounding of 1 - sum."""
    student, teacher, labels = draw(7, 101)
    labels = labels.clamp(min=0)
    entries = dense_targets(teacher, 8)
    shift = torch.tensor(1 / tail_mass).log() + entries[2].exp().log() - torch.log1p(-entries[2].exp())
    teacher = teacher.double().scatter_add(1, entries[0], shift[:, None].expand(-1, 8)).float()
    assert_close(dense_targets(teacher, 8)[2].exp(), torch.full((7,), tail_mass).double(), rtol=1e-3, atol=0)
    shard = VocabShard(0, 101, 101)
    for divergence, tail in PAIRS:
        kind = dict(divergence=divergence, tail=tail, temperature=1.0)
        want = plain(student, teacher, 8, labels, torch.float64, **kind)
        for form in FORMS[:2]:
            got = run(form, student, teacher, select_top_k(teacher, 8, shard), labels, shard, **kind)
            for our, true in zip(got, want, strict=True):
                assert_close(our.double(), true, atol=4e-6, rtol=1e-5)


def test_a_probability_too_small_for_float32_beside_a_logit_of_minus_infinity():
    """0 times infinity: P = 1e-60 of an id the student excludes. The entry counts as 0, not as NaN."""
    ids = torch.tensor([[0, 1]])
    targets = TeacherTargets(ids, torch.tensor([[0.0, -140.0]]), torch.tensor([-torch.inf]))
    student = torch.tensor([[1.0, -torch.inf, 0.5]]).requires_grad_()
    for divergence, tail in PAIRS:
        student.grad = None
        loss_T = kd_loss(
            student, targets, torch.tensor([0]), VocabShard(0, 3, 3), divergence=divergence, tail=tail
        ).loss_T
        loss_T.sum().backward()
        infinite = (divergence, tail) == ("reverse_kl", "bucket")  # the student's tail, of which the teacher has none
        assert loss_T.isinf().all() if infinite else loss_T.isfinite().all(), (divergence, tail)
        assert infinite or student.grad.isfinite().all()


@pytest.mark.parametrize("height", [-800.0, -80.0, 800.0])
def test_reverse_kl_of_a_student_that_rules_out_all_entries(height):
    """q is 0 in S, and KL(q || p) is all in the tail, however low the student's logits lie."""
    shard = VocabShard(0, 8, 8)
    targets = select_top_k(torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]), 2, shard)
    student = torch.full((1, 8), height)
    student[0, :2] = -torch.inf
    student.requires_grad_()
    loss_T = kd_loss(student, targets, torch.tensor([2]), shard, divergence="reverse_kl").loss_T
    loss_T.sum().backward()
    assert_close(loss_T, -targets.log_tail_T)
    assert_close(loss_T, torch.tensor([1.5173]), atol=5e-5, rtol=0)
    assert student.grad.abs().max() < 1e-6
