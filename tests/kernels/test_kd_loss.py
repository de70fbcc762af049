"""kd_loss and its gradient against the dense float64 definition, on 1, 2 and 4 ranks."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from megakd.kernels import VocabShard, kd_loss, kd_loss_reference, select_top_k
from megakd.kernels.divergences import FORMS
from megakd.targets import TeacherTargets
from tests.kernels.dense import PAIRS, cut, dense_loss, dense_targets, draw
from tests.ranks import run_ranks

T, V, K = 7, 101, 8  # primes: no tile, block or rank count divides T or V
LOSSES = {"kd_loss": kd_loss, "reference": kd_loss_reference}


def on_ranks(ranks, fn, *args):
    """What fn(rank, ranks, ...) returns on each rank; one rank is this process, without a group."""
    return [fn(0, 1, *args)] if ranks == 1 else run_ranks(ranks, fn, *args)


def compare(rank, ranks, loss, student_TV, teacher_TV, labels_T, *, atol, top_k=K, **options):
    """Loss, its parts and the gradient of this rank's shard against the dense ones; returns the outputs."""
    on_T = labels_T != -100
    temperature = options.pop("temperature", 1.0)
    teacher_TW, shard = cut(teacher_TV, rank, ranks)
    targets = select_top_k(teacher_TW, top_k, shard, temperature)
    targets.check()
    targets.ids_TK[~on_T], targets.logprobs_TK[~on_T], targets.log_tail_T[~on_T] = -7, torch.nan, torch.nan
    student_TW, _ = cut(student_TV, rank, ranks)
    student_TW[~on_T] = torch.nan
    student_TW.requires_grad_()
    outputs = LOSSES[loss](student_TW, targets, labels_T, shard, **options)
    student_temperature = options.get("student_temperature", temperature)
    weight_T = torch.arange(1.0, len(labels_T) + 1)  # tokens must not be mixed up
    (outputs.loss_T * weight_T).sum().backward()

    truth_TV = student_TV.double().requires_grad_()
    entries = [x[on_T] for x in dense_targets(teacher_TV, top_k, temperature)]
    kind = {k: v for k, v in options.items() if k not in ("inplace_backward", "student_temperature")}
    want = dense_loss(truth_TV[on_T], *entries, labels_T[on_T], temperature=student_temperature, **kind)
    (want[0] * weight_T[on_T]).sum().backward()
    for got_T, want_T in zip(outputs, want, strict=True):
        assert got_T.dtype == torch.float32 and (got_T[~on_T] == 0).all()
        assert_close(got_T[on_T].double(), want_T.detach(), atol=atol, rtol=1e-5)
    want_grad, width = truth_TV.grad[:, shard.start : shard.start + shard.real_width], shard.real_width
    rounding = torch.finfo(student_TV.dtype).eps if student_TV.dtype != torch.float32 else 1e-5
    assert_close(student_TW.grad[:, :width].double(), want_grad, atol=10 * atol, rtol=rounding)
    assert (student_TW.grad[:, width:] == 0).all() and (student_TW.grad[~on_T] == 0).all()
    return [part.detach() for part in outputs]


def compare_all(rank, ranks, loss, dtype):
    data = draw(T, V, dtype=dtype)
    outputs = []
    for divergence, tail in PAIRS:
        for temperature in (1.0, 2.0):
            for ce_weight in (0.0, 0.3):
                options = dict(divergence=divergence, tail=tail, temperature=temperature, ce_weight=ce_weight)
                outputs += compare(rank, ranks, loss, *data, atol=4e-6, **options)
    return torch.stack(outputs)


@pytest.mark.parametrize("loss, dtype, ranks", [
    *(("kd_loss", torch.float32, ranks) for ranks in (1, 2, 4)),
    *(("kd_loss", torch.bfloat16, ranks) for ranks in (2, 4)),
    ("kd_loss", torch.float16, 1),  # a dtype is how logits are read and written: what ranks exchange is float32
    *(("reference", torch.float32, ranks) for ranks in (1, 2, 4)),
])  # fmt: skip
def test_every_divergence_tail_temperature_and_ce_weight_is_the_dense_one(loss, dtype, ranks):
    first, *others = on_ranks(ranks, compare_all, loss, dtype)
    assert all(torch.equal(first, other) for other in others)  # to the last bit


def compare_hard(rank, ranks, loss):
    for tokens, vocabulary, top_k in [(1, 101, 1), (5, 7, 7), (3, 11, 10), (2, 13, 9), (2, 4099, 100)]:
        for divergence, tail in [*((name, "bucket") for name in FORMS), ("forward_kl", "drop")]:
            kind = dict(divergence=divergence, tail=tail, top_k=top_k)
            compare(rank, ranks, loss, *draw(tokens, vocabulary), ce_weight=0.3, temperature=2.0, atol=4e-6, **kind)
    for height in (200.0, 250.0):  # beyond exp's range, in float32 and with it relative to one maximum
        for place in ("entry", "outside", "label"):
            student, teacher, labels = draw(T, V)
            peak = {"entry": teacher.argmax(1), "outside": teacher.argmin(1), "label": labels.clamp(0)}[place]
            student.scatter_(1, peak[:, None], height)
            for divergence, tail in PAIRS:
                kind = dict(divergence=divergence, tail=tail, ce_weight=0.3, temperature=1.0)
                compare(rank, ranks, loss, student, teacher, labels, atol=2e-5, **kind)
    for divergence, tail in PAIRS:
        kind = dict(divergence=divergence, tail=tail, beta=0.2, skew=0.7, alpha=0.3, ce_weight=0.3)
        for teachers, students in [(1.0, 3.0), (2.0, 1.0), (1.5, 0.5)]:
            kind.update(temperature=teachers, student_temperature=students)
            compare(rank, ranks, loss, *draw(T, V, seed=1), atol=2e-5, **kind)
    student, teacher, labels = draw(T, V)
    teacher[:, :K] += 60  # every entry on the first rank, and a teacher's tail of e-57
    compare(rank, ranks, loss, student, teacher, labels, divergence="forward_kl", tail="bucket", atol=4e-6)
    compare(rank, ranks, loss, student, teacher, labels, divergence="reverse_kl", tail="bucket", atol=4e-5)
    for level in (1e4, -1e4):
        compare(rank, ranks, loss, student + level, teacher, labels, divergence="forward_kl", tail="bucket", atol=1e-2)
        equal = torch.full_like(student, level)
        compare(rank, ranks, loss, equal, teacher, labels, divergence="reverse_kl", tail="bucket", atol=4e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_whole_vocabularies_peaks_and_shards_without_entries(ranks):
    on_ranks(ranks, compare_hard, "kd_loss")


def shift_exactly(rank, ranks):
    """Logits of 1e4 + n/64 are exact in float32, so the loss must not lose digits by their height."""
    student, teacher, labels = draw(T, V)
    student = (student * 64).round() / 64
    options = dict(divergence="forward_kl", tail="bucket", ce_weight=0.3, temperature=2.0, atol=4e-6)
    compare(rank, ranks, "kd_loss", student + 8192, teacher, labels, **options)
    compare(rank, ranks, "kd_loss", student - 8192, teacher, labels, **{**options, "divergence": "reverse_kl"})


@pytest.mark.parametrize("ranks", [1, 2])
def test_high_logits_lose_no_digits(ranks):
    on_ranks(ranks, shift_exactly)


def inplace(rank, ranks):
    student, teacher, labels = draw(T, V)
    for dtype in (torch.float32, torch.bfloat16):
        grads = []
        for in_place in (False, True):
            student_TW, shard = cut(student.to(dtype), rank, ranks)
            leaf = torch.full((T, student_TW.shape[1] + 5), 9.0, dtype=dtype)
            leaf[:, 2:-3] = student_TW
            whole = leaf.requires_grad_() * 1
            logits_TW = whole[:, 2:-3]  # a view with strides of its own
            addresses = []
            logits_TW.register_hook(lambda grad, addresses=addresses: addresses.append(grad.data_ptr()))
            targets = select_top_k(cut(teacher, rank, ranks)[0], K, shard)
            loss = kd_loss(logits_TW, targets, labels, shard, ce_weight=0.3, inplace_backward=in_place).loss_T.sum()
            loss.backward(retain_graph=True)
            grads.append(leaf.grad.clone())
            assert (addresses[0] == logits_TW.data_ptr()) == in_place
            assert (whole[:, :2] == 9).all() and (whole[:, -3:] == 9).all() and (leaf.grad[:, :2] == 0).all()
            if in_place:
                assert torch.equal(logits_TW, leaf.grad[:, 2:-3])
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
            else:
                assert torch.equal(whole.nan_to_num(7), leaf.nan_to_num(7))
                loss.backward()
                assert_close(leaf.grad, 2 * grads[0])
        assert torch.equal(*grads)


@pytest.mark.parametrize("ranks", [1, 2])
def test_inplace_backward_gives_the_same_gradient_in_the_memory_of_the_logits(ranks):
    on_ranks(ranks, inplace)


COLLECTIVES = "all_gather all_gather_single all_reduce reduce_scatter_single broadcast all_to_all_single reduce"


@contextlib.contextmanager
def count_collectives():
    """(name, dtype, elements this rank sends) of every collective inside."""
    sent, original = [], {name: getattr(dist, name) for name in COLLECTIVES.split() if hasattr(dist, name)}

    def spy(name):
        def wrapper(*args, **kwargs):
            tensor = args[1] if name.startswith(("all_gather", "reduce_scatter")) else args[0]
            sent.append((name, tensor.dtype, tensor.numel()))
            return original[name](*args, **kwargs)

        return wrapper

    try:
        for name in original:
            setattr(dist, name, spy(name))
        yield sent
    finally:
        for name, function in original.items():
            setattr(dist, name, function)


def count_traffic(rank, ranks):
    """What selection, forward and backward send."""
    student, teacher, labels = draw(T, V, dtype=torch.bfloat16)
    (student_TW, shard), (teacher_TW, _) = cut(student, rank, ranks), cut(teacher, rank, ranks)
    student_TW.requires_grad_()
    report = {}
    for key, top_k, temperature, divergence in [
        (K, K, 1.0, "forward_kl"),
        (60, 60, 2.0, "reverse_kl"),
        ("jsd", K, 1.0, "jsd"),
    ]:
        with count_collectives() as sent:
            targets = select_top_k(teacher_TW, top_k, shard, temperature)
            report["select", key] = list(sent)
            sent.clear()
            loss = kd_loss(student_TW, targets, labels, shard, divergence=divergence, ce_weight=0.3).loss_T.sum()
            report["forward", key] = list(sent)
            sent.clear()
            loss.backward()
            report["backward", key] = list(sent)
    return report


def test_what_is_sent():
    width, gather = 52, "all_gather_single"
    for report in run_ranks(2, count_traffic):
        assert report == {
            ("select", K): [(gather, torch.bfloat16, T * K), (gather, torch.float32, T * 4)],
            ("forward", K): [(gather, torch.float32, T * 8)],
            ("backward", K): [],
            ("select", 60): [(gather, torch.bfloat16, T * width), (gather, torch.float32, T * 4)],
            ("forward", 60): [(gather, torch.float32, T * 10)],
            ("backward", 60): [],
            ("select", "jsd"): [(gather, torch.bfloat16, T * K), (gather, torch.float32, T * 4)],
            ("forward", "jsd"): [(gather, torch.float32, T * 8), (gather, torch.float32, T * 2)],
            ("backward", "jsd"): [],
        }


def empty_cases(rank, ranks):
    student, teacher, labels = draw(T, V)
    student_TW, shard = cut(student, rank, ranks)
    nothing = TeacherTargets(torch.full((T, K), -1), torch.full((T, K), -torch.inf), torch.zeros(T), entropy_T=None)
    none_at_all = TeacherTargets(torch.zeros(T, 0, dtype=torch.int64), torch.zeros(T, 0), torch.zeros(T))
    for targets in (nothing, none_at_all):
        for divergence, tail in PAIRS:
            leaf_TW = student_TW.clone().requires_grad_()
            outputs = kd_loss(leaf_TW, targets, labels, shard, divergence=divergence, tail=tail)
            outputs.loss_T.sum().backward()
            assert outputs.loss_T.abs().max() < 1e-15 and leaf_TW.grad.abs().max() < 1e-15, (divergence, tail)
        leaf_TW = student_TW.clone().requires_grad_()
        kd_loss(leaf_TW, targets, labels, shard, kd_weight=0.0, ce_weight=1.0).loss_T.sum().backward()
        truth = student.double().requires_grad_()
        torch.nn.functional.cross_entropy(truth, labels, reduction="sum").backward()
        mine = slice(shard.start, shard.start + shard.real_width)
        assert_close(leaf_TW.grad[:, : shard.real_width].double(), truth.grad[:, mine], atol=1e-6, rtol=1e-5)
    none = draw(0, V)
    outputs = compare(rank, ranks, "kd_loss", *none, divergence="forward_kl", tail="bucket", atol=0)
    assert all(part.shape == (0,) for part in outputs)
    masked = student, teacher, torch.full_like(labels, -100)
    compare(rank, ranks, "kd_loss", *masked, divergence="forward_kl", tail="bucket", atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_without_entries_without_tokens_and_without_supervision(ranks):
    on_ranks(ranks, empty_cases)


def test_an_infinite_part_of_weight_zero_stays_out():
    student, teacher, labels = draw(2, V)
    student[0, labels[0]] = student[1, teacher[1].argmax()] = -torch.inf
    shard = VocabShard(0, V, V)
    targets = select_top_k(teacher, K, shard)
    for weights, row in [(dict(), 0), (dict(kd_weight=0.0, ce_weight=1.0), 1)]:
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, targets, labels, shard, **weights).loss_T[row]
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all()


def refuse(rank, ranks):
    student, teacher, labels = draw(T, V)
    (student_TW, shard), (teacher_TW, _) = cut(student, rank, ranks), cut(teacher, rank, ranks)
    targets = select_top_k(teacher_TW, K, shard)
    valid = {(d, t) for d, t in PAIRS}
    for divergence in {name for name, _ in PAIRS} | {"mse"}:
        for tail in ("bucket", "renormalize", "renormalize_teacher", "drop", "ghost"):
            if (divergence, tail) not in valid:
                for loss in LOSSES.values():
                    with pytest.raises(ValueError, match="must be one of"):
                        loss(student_TW, targets, labels, shard, divergence=divergence, tail=tail)
    for limit in (0.0, 1.0):
        for divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
            with pytest.raises(ValueError, match="must be between 0 and 1, exclusive"):
                kd_loss(student_TW, targets, labels, shard, divergence=divergence, beta=limit, skew=limit)
    for label in (V, -1, V + 2):
        stray = labels.clone()
        stray[1] = label
        with pytest.raises(ValueError, match=f"label {label} in row 1"):
            kd_loss(student_TW, targets, stray, shard)
    torn = TeacherTargets(targets.ids_TK.clone(), targets.logprobs_TK, targets.log_tail_T)
    torn.ids_TK[2] = -1
    with pytest.raises(ValueError, match=r"sum to .* in row 2"):
        kd_loss(student_TW, torn, labels, shard)
    with pytest.raises(ValueError, match="logits must be"):
        kd_loss(student_TW[:, 1:], targets, labels, shard)
    with pytest.raises(ValueError, match="agree in the number of tokens"):
        kd_loss(student_TW[1:], targets, labels, shard)
    with pytest.raises(ValueError, match="labels must be int64"):
        kd_loss(student_TW, targets, labels.int(), shard)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        kd_loss(student_TW.double(), targets, labels, shard)
    with pytest.raises(ValueError, match="student_temperature"):
        kd_loss(student_TW, targets, labels, shard, student_temperature=0.0)
    leaf_TW = student_TW.requires_grad_()
    loss = kd_loss(leaf_TW, targets, labels, shard).loss_T.sum()
    (grad,) = torch.autograd.grad(loss, leaf_TW, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_does_not_fit_is_refused_on_every_rank(ranks):
    on_ranks(ranks, refuse)
