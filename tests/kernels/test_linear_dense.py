"""Two output layers and the whole divergence against dense float64, on 1, 2 and 4 ranks, with and without recompute."""

import functools

import pytest
import torch
from torch.testing import assert_close

from megakd.divergences import PARAMETERS
from megakd.kernels import VocabShard, dense_kd_loss, linear_dense_kd_loss, rows
from megakd.kernels.divergences import FORMS
from tests.kernels.dense import dense_divergence
from tests.kernels.test_kd_loss import count_collectives, on_ranks
from tests.kernels.test_linear import peak_bytes

T, V, H, G = 12, 101, 13, 7  # T splits over 2 and 4 ranks
MODES = [dict(), dict(gradient_in_forward=True)]


def whole_heads(dtype=torch.float32, tokens=T, vocabulary=V):
    """Hidden states and output layers of both models, and labels of which two are masked."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(tokens, H), (vocabulary, H), (tokens, G), (vocabulary, G)]
    heads = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    labels_T = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels_T[[0, 4] if tokens > 4 else []] = -100
    return [*heads, labels_T]


def shard_of(weight_VH, rank, ranks, padding=3):
    """This rank's rows of an output layer padded with NaN, and the shard."""
    size = len(weight_VH)
    width = -(-(size + padding) // ranks)
    padded = torch.nn.functional.pad(weight_VH, (0, 0, 0, width * ranks - size), value=torch.nan)
    group = torch.distributed.group.WORLD if ranks > 1 else None
    shard = VocabShard(rank * width, (rank + 1) * width, size, group)
    return padded[shard.start : shard.stop].clone(), shard


def truth(hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T, token_weight_T, softcaps=(None, None), **options):
    """(loss, kd, ce, gradient of the hidden states, of the whole weight) by the definition, in float64."""
    on_T = labels_T != -100
    hidden, weight = hidden_TH.double().requires_grad_(), weight_VH.double().requires_grad_()
    student_TV, teacher_TV = hidden @ weight.T, teacher_TG.double() @ teacher_VG.double().T
    if softcaps[0] is not None:
        student_TV = softcaps[0] * torch.tanh(student_TV / softcaps[0])
    if softcaps[1] is not None:
        teacher_TV = softcaps[1] * torch.tanh(teacher_TV / softcaps[1])
    teachers = options.get("temperature", 1.0)
    students = options.get("student_temperature") or teachers
    p, q = (teacher_TV[on_T] / teachers).softmax(1), (student_TV[on_T] / students).softmax(1)
    kd = dense_divergence(options["divergence"], p, q, *(options.get(*pair) for pair in PARAMETERS.items()))
    ce = torch.nn.functional.cross_entropy(student_TV[on_T], labels_T[on_T], reduction="none")
    loss = options.get("kd_weight", 1.0) * students**2 * kd + options.get("ce_weight", 0.0) * ce
    (3 * loss * token_weight_T[on_T]).sum().backward()
    return loss.detach(), kd.detach(), ce.detach(), hidden.grad, weight.grad


def compare(rank, ranks, heads, mode, *, atol, rounding, block_tokens=5, softcaps=(None, None), **options):
    hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T = heads
    on_T, token_weight_T = labels_T != -100, torch.arange(1.0, len(labels_T) + 1)
    (weight_WH, shard), (teacher_WG, _) = shard_of(weight_VH, rank, ranks), shard_of(teacher_VG, rank, ranks)
    hidden = torch.where(on_T[:, None], hidden_TH, torch.nan).requires_grad_()  # masked rows are not read
    teacher_TG = torch.where(on_T[:, None], teacher_TG, torch.nan)
    weight = weight_WH.requires_grad_()
    kept = dict(mode, token_weight_T=token_weight_T) if mode else mode
    kept = dict(kept, block_tokens=block_tokens, softcap=softcaps[0], teacher_softcap=softcaps[1], **options)
    outputs = linear_dense_kd_loss(hidden, weight, teacher_TG, teacher_WG, labels_T, shard, **kept)
    (3 * outputs.loss_T * token_weight_T).sum().backward()
    *wanted, grad_TH, grad_VH = truth(*heads, token_weight_T, softcaps, **options)
    for got_T, want in zip(outputs, (*wanted, torch.ones(1), torch.ones(1)), strict=True):
        assert (got_T[~on_T] == 0).all()
        assert_close(got_T[on_T].double(), want.double().expand(int(on_T.sum())), atol=atol, rtol=10 * rounding)
    for got, want in [(hidden.grad, grad_TH), (weight.grad[: shard.real_width], grad_VH[shard.start : shard.stop])]:
        assert_close(got.double(), want, atol=4 * rounding * want.abs().max().item() if want.numel() else 0, rtol=0)
    assert (hidden.grad[~on_T] == 0).all() and (weight.grad[shard.real_width :] == 0).all()
    return torch.stack([part.detach() for part in outputs])


def compare_all(rank, ranks):
    results = []
    for mode in MODES:
        for divergence in FORMS:
            for temperatures in [dict(), dict(temperature=2.0), dict(temperature=1.5, student_temperature=3.0)]:
                for weights in [dict(), dict(ce_weight=0.3), dict(kd_weight=0.0, ce_weight=1.0)]:
                    options = dict(divergence=divergence, beta=0.2, skew=0.7, alpha=0.3, **temperatures, **weights)
                    results.append(compare(rank, ranks, whole_heads(), mode, atol=1e-5, rounding=2e-6, **options))
            tiny = whole_heads(tokens=3, vocabulary=2)
            compare(rank, ranks, tiny, mode, atol=1e-5, rounding=2e-6, divergence=divergence, ce_weight=0.3)
    return torch.stack(results)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_divergence_temperature_and_weight_is_the_definition(ranks):
    first, *others = on_ranks(ranks, compare_all)
    assert all(torch.equal(first, other) for other in others)


def compare_capped_and_rounded(rank, ranks):
    for mode in MODES:
        options = dict(divergence="jsd", temperature=2.0, ce_weight=0.3, beta=0.5)
        compare(rank, ranks, whole_heads(), mode, atol=1e-5, rounding=2e-6, softcaps=(5.0, 3.0), **options)
        compare(rank, ranks, whole_heads(), mode, atol=1e-5, rounding=2e-6, block_tokens=T, **options)
        hidden_TH, weight_VH, *teacher = whole_heads(torch.bfloat16)
        compare(rank, ranks, (hidden_TH, weight_VH, *teacher), mode, atol=4e-2, rounding=1e-2, **options)
        mixed = hidden_TH.float(), weight_VH.float(), *teacher  # the teacher alone in 16 bits
        compare(rank, ranks, mixed, mode, atol=4e-2, rounding=1e-2, **options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_soft_caps_one_block_and_bfloat16(ranks):
    on_ranks(ranks, compare_capped_and_rounded)


def compare_to_logits(rank, ranks, dtype):
    """Blocks of any size give what the logits give, to the rounding of the products."""
    hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T = whole_heads(dtype)
    (weight_WH, shard), (teacher_WG, _) = shard_of(weight_VH, rank, ranks), shard_of(teacher_VG, rank, ranks)
    for divergence in ("forward_kl", "tvd"):
        plain = dense_kd_loss(
            hidden_TH @ weight_WH.T, teacher_TG @ teacher_WG.T, labels_T, shard, divergence=divergence
        )
        for block_tokens in (1, 5, 100):
            given = hidden_TH, weight_WH, teacher_TG, teacher_WG, labels_T, shard
            blocks = linear_dense_kd_loss(*given, divergence=divergence, block_tokens=block_tokens)
            assert_close(blocks.loss_T, plain.loss_T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_the_logits(dtype):
    on_ranks(2, compare_to_logits, dtype)


def split_over_the_sequence(rank, ranks):
    hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T = whole_heads()
    (weight_WH, shard), (teacher_WG, _) = shard_of(weight_VH, rank, ranks), shard_of(teacher_VG, rank, ranks)
    mine = slice(rank * T // ranks, (rank + 1) * T // ranks)
    for mode in MODES:
        for divergence, sums in (("reverse_kl", 0), ("jsd", 1)):
            results = []
            for part, parallel in [(slice(None), False), (mine, True)]:
                hidden, weight = hidden_TH[part].clone().requires_grad_(), weight_WH.clone().requires_grad_()
                options = dict(divergence=divergence, sequence_parallel=parallel, block_tokens=4, **mode)
                with count_collectives() as sent:
                    loss = linear_dense_kd_loss(
                        hidden, weight, teacher_TG[part], teacher_WG, labels_T, shard, **options
                    )
                    loss.loss_T.sum().backward()
                results.append((loss.loss_T, hidden.grad, weight.grad, [name for name, *_ in sent]))
            (loss_T, grad_TH, grad_WH, plain), (split_T, split_TH, split_WH, split) = results
            assert_close(split_T, loss_T)
            assert_close(split_TH, grad_TH[mine])
            assert_close(split_WH, grad_WH)
            if ranks > 1:
                gathers = ["all_gather_single"] * (1 + sums) * (3 if mode else 1)  # 10 supervised tokens in blocks of 4
                assert plain == [*gathers, "all_reduce"]
                both = ["all_gather_single"] * 2
                assert split == [*both, *gathers, *([] if mode else both), "reduce_scatter_single"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sequence_parallel_and_what_is_sent(ranks):
    on_ranks(ranks, split_over_the_sequence)


@pytest.mark.parametrize("mode", MODES)
def test_the_teacher_is_frozen_and_main_grad_takes_the_gradient(mode):
    hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T = whole_heads()
    shard, plain = VocabShard(0, V, V), weight_VH.clone().requires_grad_()
    teacher = teacher_TG.requires_grad_(), teacher_VG.requires_grad_()
    given = hidden_TH, plain, *teacher, labels_T, shard
    linear_dense_kd_loss(*given, block_tokens=5, **mode).loss_T.sum().backward()
    assert teacher[0].grad is None and teacher[1].grad is None and hidden_TH.grad is None
    weight = weight_VH.clone().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    given = hidden_TH, weight, *teacher, labels_T, shard
    linear_dense_kd_loss(*given, block_tokens=5, accumulate_into_main_grad=True, **mode).loss_T.sum().backward()
    assert weight.grad_added_to_main_grad
    assert_close(weight.main_grad - 1, plain.grad, atol=1e-5, rtol=1e-5)
    hidden = hidden_TH.clone().requires_grad_()
    loss = linear_dense_kd_loss(hidden, weight_VH, *teacher, labels_T, shard, **mode).loss_T.sum()
    loss.backward(retain_graph=True)
    if mode:
        with pytest.raises(RuntimeError, match="no second backward"):
            loss.backward()
    masked = torch.full_like(labels_T, -100)
    hidden.grad = None
    linear_dense_kd_loss(hidden, weight_VH, *teacher, masked, shard, **mode).loss_T.sum().backward()
    assert (hidden.grad == 0).all()
    nothing = hidden_TH[:0], weight_VH, teacher[0][:0], teacher[1], labels_T[:0], shard
    assert len(linear_dense_kd_loss(*nothing, **mode).loss_T) == 0


def train(*arguments, **options):
    linear_dense_kd_loss(*arguments, **options).loss_T.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_memory_is_two_blocks_whatever_the_number_of_tokens(mode, divergence, monkeypatch):
    size, block = 8192, 16
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4 * size)
    block_bytes = 2 * block * size
    peaks = []
    for tokens in (64, 256):
        *heads, labels_T = whole_heads(torch.bfloat16, tokens, size)
        hidden, weight, *teacher = (x.requires_grad_(n < 2) for n, x in enumerate(heads))
        weight.main_grad = torch.zeros(size, H)
        given = hidden, weight, *teacher, labels_T, VocabShard(0, size, size)
        options = dict(divergence=divergence, block_tokens=block, accumulate_into_main_grad=True, **mode)
        step = functools.partial(train, *given, **options)
        step()
        peaks.append(peak_bytes(step))
    work = 4 * 2 * 3 * size  # dense_rows reads two rows of both at a time into float32 buffers, and a third
    tokens_own = 256 * (2 * (H + G) + 40 * 8)
    assert peaks[1] < 3.5 * block_bytes + work + tokens_own, [peak / block_bytes for peak in peaks]
    assert peaks[1] - peaks[0] < tokens_own


def test_blocks_show_both_models_logits():
    hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T = whole_heads()
    seen = []
    given = hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T, VocabShard(0, V, V)
    linear_dense_kd_loss(*given, block_tokens=3, on_logits=lambda rows, *both: seen.append([x.clone() for x in both]))
    on_T = labels_T != -100
    student_TV, teacher_TV = map(torch.cat, zip(*seen, strict=True))
    assert_close(student_TV, (hidden_TH @ weight_VH.T)[on_T])
    assert_close(teacher_TV, (teacher_TG @ teacher_VG.T)[on_T])


def test_refusals():
    hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T = whole_heads()
    shard = VocabShard(0, V, V)

    def refused(message, *arguments, **options):
        given = arguments or (hidden_TH, weight_VH, teacher_TG, teacher_VG, labels_T)
        with pytest.raises(ValueError, match=message):
            linear_dense_kd_loss(*given, shard, **options)

    refused("the weight .* for ids", hidden_TH, weight_VH, teacher_TG, teacher_VG[1:], labels_T)
    refused("must both be", hidden_TH, weight_VH, teacher_TG.bfloat16(), teacher_VG, labels_T)
    refused("agree in the number of tokens", hidden_TH, weight_VH, teacher_TG[1:], teacher_VG, labels_T)
    refused("temperatures must be", temperature=0.0)
    refused("divergence must be one of", divergence="mse")
    refused("softcap must be a positive number", teacher_softcap=0.0)
    refused("goes with gradient_in_forward", token_weight_T=torch.ones(T))
    refused("all_supervised says that there is none", all_supervised=True)
    broken_TG = teacher_TG.clone()
    broken_TG[9] = torch.inf
    for mode in MODES:
        refused(
            "NaN or infinity in 1 of .* rows, first in row 9",
            *(hidden_TH, weight_VH, broken_TG, teacher_VG, labels_T), block_tokens=2, **mode,
        )  # fmt: skip
        stray_T = labels_T.clone()
        stray_T[8] = V
        refused(f"label {V} in row 8", hidden_TH, weight_VH, teacher_TG, teacher_VG, stray_T, block_tokens=2, **mode)
