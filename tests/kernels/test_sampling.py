"""sample_targets: unbiased for the whole vocabulary, the same on every split of it up to the order of draws."""

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from megakd.kernels import kd_loss, kd_loss_reference, sample_targets
from tests.kernels.dense import PAIRS, cut, draw
from tests.kernels.test_kd_loss import on_ranks

V = 101


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def means_are_exact(rank, ranks, temperature):
    """Over many rows of one teacher, every mean lies within 5 standard errors of the exact value."""
    tokens, draws = 6000, 5
    student, teacher, _ = draw(2, V, seed=3)
    student, teacher = student[:1].expand(tokens, V), teacher[:1].expand(tokens, V)
    labels = torch.zeros(tokens, dtype=torch.int64)
    (student_TW, shard), (teacher_TW, _) = cut(student, rank, ranks), cut(teacher, rank, ranks)
    targets = sample_targets(teacher_TW, draws, shard, seeded(), temperature)
    targets.check()
    whole = sample_targets(teacher_TW, draws, shard, seeded(), temperature, gather=True)
    whole.check()
    assert_close(whole.logprobs_TK.exp().sum(1), torch.ones(tokens))
    student_TW.requires_grad_()
    outputs = kd_loss(student_TW, targets, labels, shard)
    outputs.loss_T.sum().backward()

    truth = student[:1].double().requires_grad_()
    log_p, log_q = ((x.double() / temperature).log_softmax(1) for x in (teacher[:1], truth))
    exact_kl = (log_p.exp() * (log_p - log_q)).sum()
    (temperature**2 * exact_kl).backward()
    entropy = -(log_p.exp() * log_p).sum()
    assert_close(targets.entropy_T.double(), entropy.expand(tokens), atol=1e-6, rtol=0)
    mine, width = slice(shard.start, shard.start + shard.real_width), shard.real_width
    p = log_p.exp()[0, mine]
    seen = torch.zeros(tokens, V).scatter_add_(1, whole.ids_TK.clamp(min=0), whole.logprobs_TK.exp())[:, mine]
    close_in_the_mean(seen, p, p * (1 - p) / draws)
    close_in_the_mean(student_TW.grad[:, :width], truth.grad[0, mine], temperature**2 * p * (1 - p) / draws)
    spread = outputs.kd_T.double().var()
    close_in_the_mean(outputs.kd_T[:, None], exact_kl.detach()[None], spread)
    return whole.ids_TK


def close_in_the_mean(samples_TX, exact_X, variance_X):
    error_X = (samples_TX.double().mean(0) - exact_X).abs()
    assert (error_X <= 5 * (variance_X / len(samples_TX)).sqrt() + 1e-6).all(), error_X.max()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_value_and_frequencies_are_unbiased(ranks, temperature):
    first, *others = on_ranks(ranks, means_are_exact, temperature)
    assert all(torch.equal(first, other) for other in others)


def match_the_definition(rank, ranks):
    student, teacher, labels = draw(7, V)
    for dtype in (torch.float32, torch.bfloat16):
        (student_TW, shard), (teacher_TW, _) = cut(student.to(dtype), rank, ranks), cut(teacher.to(dtype), rank, ranks)
        for gather in (False, True):
            targets = sample_targets(teacher_TW, 20, shard, seeded(), 2.0, gather=gather)
            for tail in ("bucket", "drop", "renormalize_teacher"):
                results = []
                for loss in (kd_loss, kd_loss_reference):
                    leaf_TW = student_TW.clone().requires_grad_()
                    outputs = loss(leaf_TW, targets, labels, shard, tail=tail, ce_weight=0.3)
                    outputs.loss_T.sum().backward()
                    results.append((*outputs, leaf_TW.grad))
                for got, want in zip(*results, strict=True):
                    assert_close(got, want, atol=1e-5, rtol=torch.finfo(dtype).eps if got is results[0][-1] else 1e-5)
    for divergence, tail in {*PAIRS, ("forward_kl", "renormalize")} - {
        ("forward_kl", t) for t in ("bucket", "drop", "renormalize_teacher")
    }:
        with pytest.raises(ValueError, match="sampled targets"):
            kd_loss(student_TW, targets, labels, shard, divergence=divergence, tail=tail)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_of_sampled_targets_is_its_definition_and_other_divergences_are_refused(ranks):
    on_ranks(ranks, match_the_definition)


def hard_cases(rank, ranks):
    teacher = torch.full((5, V), -1e4)
    teacher[0, 3] = teacher[1, V - 1] = 1e4  # certain, on the first and on the last rank
    teacher[2] = 0.0
    teacher[3, :2] = torch.tensor([250.0, 250.0])
    teacher[4, [0, V - 1]] = torch.tensor([250.0, 250.0])
    teacher_TW, shard = cut(teacher, rank, ranks)
    targets = sample_targets(teacher_TW, 300, shard, seeded(), gather=True)
    targets.check()
    assert targets.ids_TK[0, :2].tolist() == [3, -1] and targets.ids_TK[1, :2].tolist() == [V - 1, -1]
    assert targets.ids_TK[3, :3].tolist() == [0, 1, -1] and targets.ids_TK[4, :3].tolist() == [0, V - 1, -1]
    want = torch.tensor([0.0, 0.0, V, 2.0, 2.0]).log().clamp(min=0)
    assert_close(targets.entropy_T, want, atol=1e-6, rtol=1e-6)
    assert len(sample_targets(teacher_TW[:0], 3, shard, seeded()).ids_TK) == 0
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken, _ = cut(teacher.clone().index_fill_(1, torch.tensor([V - 1]), bad), rank, ranks)
        with pytest.raises(ValueError, match="NaN or infinity"):
            sample_targets(broken, 3, shard, seeded())
    with pytest.raises(ValueError, match="draws must be"):
        sample_targets(teacher_TW, 0, shard, seeded())
    if ranks > 1:
        with pytest.raises(ValueError, match="generators differ"):
            sample_targets(teacher_TW, 3, shard, seeded(dist.get_rank()))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_certain_equal_and_broken_teachers(ranks):
    on_ranks(ranks, hard_cases)
