"""The fused output layer against the same loss of materialised logits, on 1 and 2 ranks, with and without recompute."""

import contextlib

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from megakd.divergences import DIVERGENCES
from megakd.kernels import (
    VocabShard,
    dense_kd_loss,
    kd_loss,
    kd_loss_reference,
    linear_kd_loss,
    linear_select_top_k,
    rows,
    sample_targets,
    select_top_k,
)
from megakd.kernels.linear import check_head
from megakd.targets import TeacherTargets
from tests.kernels.dense import PAIRS, draw
from tests.kernels.test_kd_loss import count_collectives, on_ranks

T, V, H, K = 10, 101, 13, 8  # T splits over 2 ranks
MODES = [dict(), dict(gradient_in_forward=True)]


def head(rank, ranks, dtype=torch.float32, tokens=T):
    """Hidden states, this rank's rows of the output layer (0 in the padding), and the shard."""
    generator = torch.Generator().manual_seed(5)
    width = -(-(V + 3) // ranks)
    weight_VH = torch.zeros(width * ranks, H)
    weight_VH[:V] = torch.randn(V, H, generator=generator)
    hidden_TH = torch.randn(tokens, H, generator=generator)
    group = torch.distributed.group.WORLD if ranks > 1 else None
    shard = VocabShard(rank * width, (rank + 1) * width, V, group)
    return hidden_TH.to(dtype), weight_VH[shard.start : shard.stop].to(dtype), shard


def labels_with_gaps(tokens=T):
    labels_T = draw(tokens, V, seed=2)[2]
    labels_T[[0, 4]] = -100
    return labels_T


def both_ways(hidden_TH, weight_WH, targets, labels_T, shard, mode, token_weight_T, block_tokens=3, **options):
    """(loss, gradient of the hidden states, of the weight) of materialised logits and of the fused layer."""
    results = []
    for fused in (False, True):
        hidden, weight = hidden_TH.clone().requires_grad_(), weight_WH.clone().requires_grad_()
        if fused:
            weight = weight_WH.clone()
            weight[shard.real_width :] = torch.nan
            weight.requires_grad_()
            if "gradient_in_forward" in mode:
                mode = dict(mode, token_weight_T=token_weight_T)
            outputs = linear_kd_loss(
                hidden, weight, targets, labels_T, shard, block_tokens=block_tokens, **mode, **options
            )
        else:
            outputs = kd_loss(hidden @ weight.T, targets, labels_T, shard, **options)
        (3 * outputs.loss_T * token_weight_T).sum().backward()
        if not fused:
            shard.sum_over_ranks(hidden.grad)
        results.append((outputs, hidden.grad, weight.grad))
    return results


def compare_all(rank, ranks, dtype):
    hidden_TH, weight_WH, shard = head(rank, ranks, dtype)
    teacher_TV = draw(T, V, seed=1)[1]
    teacher_TW = torch.nn.functional.pad(teacher_TV, (0, 3))[:, shard.start : shard.stop]
    labels_T, token_weight_T = labels_with_gaps(), torch.arange(1.0, T + 1)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    outputs = []
    for mode in MODES:
        for divergence, tail in PAIRS:
            for temperature in (1.0, 2.0):
                targets = select_top_k(teacher_TW, K, shard, temperature)
                options = dict(divergence=divergence, tail=tail, ce_weight=0.3)
                plain, fused = both_ways(
                    hidden_TH, weight_WH, targets, labels_T, shard, mode, token_weight_T, **options
                )
                for got, want in zip(fused[0], plain[0], strict=True):
                    assert_close(got, want, atol=1e-5, rtol=1e-5)
                for got, want in zip(fused[1:], plain[1:], strict=True):
                    assert_close(got, want, atol=2 * rounding * want.abs().max().item(), rtol=rounding)
                assert (fused[1][labels_T == -100] == 0).all()
                outputs += [part.detach() for part in fused[0]]
        targets = sample_targets(teacher_TW, 20, shard, torch.Generator().manual_seed(0))
        plain, fused = both_ways(hidden_TH, weight_WH, targets, labels_T, shard, mode, token_weight_T, block_tokens=T)
        assert_close(fused[0].kd_T, plain[0].kd_T, atol=1e-5, rtol=1e-5)
        assert_close(fused[2], plain[2], atol=2 * rounding * plain[2].abs().max().item(), rtol=rounding)
    return torch.stack(outputs)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_layer_is_the_layer_and_the_loss(ranks, dtype):
    first, *others = on_ranks(ranks, compare_all, dtype)
    assert all(torch.equal(first, other) for other in others)


def sequence_parallel(rank, ranks):
    hidden_TH, weight_WH, shard = head(rank, ranks)
    labels_T = labels_with_gaps()
    mine = slice(rank * T // ranks, (rank + 1) * T // ranks)
    whole = linear_select_top_k(hidden_TH, weight_WH, K, shard, block_tokens=3)
    split = linear_select_top_k(hidden_TH[mine], weight_WH, K, shard, sequence_parallel=True, block_tokens=4)
    direct = select_top_k(hidden_TH @ weight_WH.T, K, shard)
    for targets in (whole, split):
        assert torch.equal(targets.ids_TK, direct.ids_TK) and targets.temperature == 1.0
        assert_close(targets.logprobs_TK, direct.logprobs_TK)
        assert_close(targets.log_tail_T, direct.log_tail_T)
    two = linear_select_top_k(hidden_TH, weight_WH, K, shard, 2.0, gather=True, block_tokens=T)
    assert torch.equal(two.ids_TK, select_top_k(hidden_TH @ weight_WH.T, K, shard, 2.0, gather=True).ids_TK)
    student_WH = weight_WH.flip(1).contiguous()
    for mode in MODES:
        results = []
        for part, parallel in [(slice(None), False), (mine, True)]:
            hidden, weight = hidden_TH[part].clone().requires_grad_(), student_WH.clone().requires_grad_()
            with count_collectives() as sent:
                loss = linear_kd_loss(
                    hidden, weight, whole, labels_T, shard, sequence_parallel=parallel, block_tokens=3, **mode
                )
                loss.loss_T.sum().backward()
            results.append((loss.loss_T, hidden.grad, weight.grad, [name for name, *_ in sent]))
        (loss_T, grad_TH, grad_WH, _), (split_T, split_TH, split_WH, _) = results
        assert_close(split_T, loss_T)
        assert_close(split_TH, grad_TH[mine])
        assert_close(split_WH, grad_WH)
        if ranks > 1:
            records = ["all_gather_single"] * (3 if mode else 1)  # 8 supervised tokens in blocks of 3
            assert results[0][3] == [*records, "all_reduce"]
            again = [] if mode else ["all_gather_single"]
            assert results[1][3] == ["all_gather_single", *records, *again, "reduce_scatter_single"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sequence_parallel_selection_and_what_is_sent(ranks):
    on_ranks(ranks, sequence_parallel)


def one_rank(tokens=T, dtype=torch.float32):
    hidden_TH, weight_WH, shard = head(0, 1, dtype, tokens)
    targets = select_top_k(torch.nn.functional.pad(draw(tokens, V, seed=1)[1], (0, 3)), K, shard)
    return hidden_TH, weight_WH, shard, targets, labels_with_gaps(tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_takes_the_gradient_as_megatron_expects(mode, dtype, tied):
    hidden_TH, weight_WH, shard, targets, labels_T = one_rank(dtype=dtype)
    plain = weight_WH.clone().requires_grad_()
    (2 * linear_kd_loss(hidden_TH, plain, targets, labels_T, shard, block_tokens=3, **mode).loss_T.sum()).backward()
    weight = weight_WH.clone().requires_grad_()
    with pytest.raises(ValueError, match="needs a weight with a main_grad"):
        linear_kd_loss(hidden_TH, weight, targets, labels_T, shard, accumulate_into_main_grad=True)
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied
    options = dict(accumulate_into_main_grad=True, block_tokens=3, **mode)
    if mode:  # added in the forward, where nobody knows a factor
        options["token_weight_T"] = torch.full((T,), 2.0)
    factor_T = options.get("token_weight_T", 2.0)
    (factor_T * linear_kd_loss(hidden_TH, weight, targets, labels_T, shard, **options).loss_T).sum().backward()
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    assert (weight.grad == 0).all() or not tied
    assert_close(weight.main_grad - 1, plain.grad.float(), atol=1e-6, rtol=torch.finfo(dtype).eps)
    if mode:
        with pytest.raises(RuntimeError, match="main_grad, token_weight_T itself"):
            linear_kd_loss(hidden_TH, weight, targets, labels_T, shard, **options).loss_T.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parts_second_backwards_and_weights_that_differ(mode):
    hidden_TH, weight_WH, shard, targets, labels_T = one_rank()
    hidden, weight = hidden_TH.clone().requires_grad_(), weight_WH.clone().requires_grad_()
    linear_kd_loss(hidden, weight_WH, targets, labels_T, shard, **mode).loss_T.sum().backward()
    linear_kd_loss(hidden_TH, weight, targets, labels_T, shard, **mode).loss_T.sum().backward()
    assert weight_WH.grad is None and hidden_TH.grad is None
    assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0

    again = hidden_TH.clone().requires_grad_()
    loss = linear_kd_loss(again, weight, targets, labels_T, shard, **mode).loss_T.sum()
    loss.backward(retain_graph=True)
    first = again.grad.clone()
    if mode:
        with pytest.raises(RuntimeError, match="no second backward"):
            loss.backward()
        loss_T = linear_kd_loss(again, weight, targets, labels_T, shard, **mode).loss_T
        with pytest.raises(RuntimeError, match="other token weights"):
            loss_T[:3].sum().backward()
    else:
        loss.backward()
        assert_close(again.grad, 2 * first)
    nothing = torch.full_like(labels_T, -100)
    again.grad = None
    linear_kd_loss(again, weight, targets, nothing, shard, **mode).loss_T.sum().backward()
    assert (again.grad == 0).all()
    empty = TeacherTargets(targets.ids_TK[:0], targets.logprobs_TK[:0], targets.log_tail_T[:0])
    assert len(linear_kd_loss(hidden_TH[:0], weight, empty, labels_T[:0], shard, **mode).loss_T) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_tokens", [3, 64])
def test_on_a_gpu_it_is_the_layer_and_the_loss(mode, block_tokens):
    hidden_TH, weight_WH, shard, targets, labels_T = (
        x.to("cuda") if hasattr(x, "to") else x for x in one_rank(dtype=torch.bfloat16)
    )
    results = []
    for fused in (False, True):
        hidden, weight = hidden_TH.clone().requires_grad_(), weight_WH.clone().requires_grad_()
        if fused:
            mode = dict(mode, block_tokens=block_tokens)
            loss_T = linear_kd_loss(hidden, weight, targets, labels_T, shard, ce_weight=0.3, **mode).loss_T
        else:
            loss_T = kd_loss(hidden @ weight.T, targets, labels_T, shard, ce_weight=0.3).loss_T
        loss_T.sum().backward()
        results.append((loss_T, hidden.grad, weight.grad))
    for got, want in zip(*results[::-1], strict=True):
        assert_close(got, want, atol=2e-2 * want.abs().max().item(), rtol=2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(mode):
    hidden_TH, weight_WH, shard, _, labels_T = one_rank()
    results = []
    for enabled in (False, True):
        hidden, weight = hidden_TH.clone().requires_grad_(), weight_WH.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            targets = linear_select_top_k(hidden, weight_WH.flip(0), K, shard, block_tokens=3)
            loss_T = linear_kd_loss(hidden, weight, targets, labels_T, shard, block_tokens=3, **mode).loss_T
        loss_T.sum().backward()
        results.append((targets.logprobs_TK, loss_T.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_refusals():
    hidden_TH, weight_WH, shard, targets, labels_T = one_rank()

    def refused(message, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            linear_kd_loss(*(arguments or (hidden_TH, weight_WH, targets, labels_T)), shard, **options)

    refused("the weight .* for ids", hidden_TH, weight_WH[1:], targets, labels_T)
    refused("must both be", hidden_TH.bfloat16(), weight_WH, targets, labels_T)
    refused("agree in the number of tokens", hidden_TH[1:], weight_WH, targets, labels_T)
    refused("block_tokens", block_tokens=0)
    refused("softcap must be a positive number", softcap=0.0)
    refused("softcap must be a positive number", softcap=float("inf"))
    refused("goes with gradient_in_forward", token_weight_T=torch.ones(T))
    refused(r"token_weight_T must be \[10\]", token_weight_T=torch.ones(3), gradient_in_forward=True)
    with torch.no_grad():
        refused("where gradients are off", gradient_in_forward=True)
    labels_T[8] = V
    refused(f"label {V} in row 8", gradient_in_forward=True, block_tokens=2)
    refused(f"label {V} in row 8", block_tokens=2)
    labels_T[8] = -100
    targets.log_tail_T[9] = 0
    refused("in row 9; expected 1", gradient_in_forward=True, block_tokens=2)


def deferred(work_of, waited):
    """A collective that is done when its handle is waited for, and not before."""

    class Work:
        def __init__(self, arguments, options):
            self.given = arguments, options

        def wait(self):
            arguments, options = self.given
            work_of(*arguments, **options).wait()
            waited.append(1)

    return lambda *arguments, async_op=False, **options: (
        Work(arguments, options | {"async_op": True}) if async_op else work_of(*arguments, **options)
    )


def with_late_sums(rank, ranks, mode, sequence_parallel):
    """The gradients where sums over ranks come late, and where they do not; and how many were waited for."""
    hidden_TH, weight_WH, shard = head(rank, ranks)
    targets, labels_T = select_top_k(hidden_TH.flip(0) @ weight_WH.T, K, shard), labels_with_gaps()
    hidden_TH = hidden_TH.chunk(ranks)[rank] if sequence_parallel else hidden_TH
    results, waited = [], []
    for late in (False, True):
        hidden, weight = hidden_TH.clone().requires_grad_(), weight_WH.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single") if late else ():
                if hasattr(torch.distributed, name):
                    patch.setattr(torch.distributed, name, deferred(getattr(torch.distributed, name), waited))
            options = dict(mode, sequence_parallel=sequence_parallel, block_tokens=3)
            linear_kd_loss(hidden, weight, targets, labels_T, shard, **options).loss_T.sum().backward()
        results.append((hidden.grad, weight.grad))
    return [torch.equal(*pair) for pair in zip(*results, strict=True)], len(waited)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_sum_over_ranks_is_started_early_and_waited_for(mode, sequence_parallel):
    assert on_ranks(2, with_late_sums, mode, sequence_parallel) == [([True, True], 1)] * 2


def capped(rank, ranks, dtype, softcap):
    """Squared distances from float64 of (loss, hidden gradient, weight gradient), and the squared sizes of these:
    [PyTorch in the same dtype, each mode of the fused layer, sizes]."""
    found = torch.zeros(2 + len(MODES), 3, dtype=torch.float64)
    for seed in range(4):
        hidden_TH, weight_WH, shard = (2 * x if isinstance(x, torch.Tensor) else x for x in head(rank, ranks, dtype))
        hidden_TH = hidden_TH.roll(seed, 1)  # logits of about 14, up to 60
        teacher_TW = torch.nn.functional.pad(draw(T, V, seed=seed)[1], (0, 3))[:, shard.start : shard.stop]
        targets, labels_T = select_top_k(teacher_TW, K, shard, 2.0), labels_with_gaps()
        token_weight_T, results = torch.arange(1.0, T + 1), []
        for mode, kind in [(None, torch.float64), (None, dtype), *((mode, dtype) for mode in MODES)]:
            hidden, weight = (x.to(kind, copy=True).requires_grad_() for x in (hidden_TH, weight_WH))
            if mode is None:
                logits_TW = softcap * torch.tanh(hidden @ weight.T / softcap)
                form = kd_loss_reference if kind == torch.float64 else kd_loss
                loss_T = form(logits_TW, targets, labels_T, shard, ce_weight=0.3).loss_T
            else:
                mode = dict(mode, token_weight_T=token_weight_T) if mode else mode
                options = dict(mode, softcap=softcap, block_tokens=3, ce_weight=0.3)
                loss_T = linear_kd_loss(hidden, weight, targets, labels_T, shard, **options).loss_T
            (loss_T * token_weight_T).sum().backward()
            if mode is None:
                shard.sum_over_ranks(hidden.grad)
            results.append([x.detach().double() for x in (loss_T, hidden.grad, weight.grad)])
        truth = results[0]
        for i, ours in enumerate(results[1:]):
            found[i] += torch.stack([(got - want).square().sum() for got, want in zip(ours, truth, strict=True)])
        found[-1] += torch.stack([want.square().sum() for want in truth])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [30.0, 3.0])
def test_soft_capped_logits_are_fused_as_exactly_as_pytorch_computes_them(ranks, dtype, softcap):
    pytorchs, *ours, size = sum(on_ranks(ranks, capped, dtype, softcap)).sqrt()
    for error in ours:  # two draws of one rounding error differ by so much
        assert (error <= 1.5 * pytorchs + 1e-6 * size).all(), (error / pytorchs).tolist()
        assert (error <= (1e-5 if dtype == torch.float32 else 2e-2) * size).all(), (error / size).tolist()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_selection_and_loss_see_the_same_logits_as_the_caller(softcap):
    hidden_TH, weight_WH, shard, _, labels_T = one_rank()
    logits_TW = hidden_TH @ weight_WH.T
    logits_TW = logits_TW if softcap is None else softcap * torch.tanh(logits_TW / softcap)
    want = select_top_k(logits_TW, K, shard)
    got = linear_select_top_k(hidden_TH, weight_WH, K, shard, softcap=softcap, block_tokens=3)
    assert torch.equal(got.ids_TK, want.ids_TK)
    assert_close(got.logprobs_TK, want.logprobs_TK)
    for mode in MODES:
        seen_TW, hidden = torch.full_like(logits_TW, torch.nan), hidden_TH.clone().requires_grad_()
        options = dict(mode, softcap=softcap, block_tokens=3, on_logits=seen_TW.__setitem__)
        linear_kd_loss(hidden, weight_WH, want, labels_T, shard, **options).loss_T.sum().backward()
        assert_close(seen_TW[labels_T != -100], logits_TW[labels_T != -100])
        assert seen_TW[labels_T == -100].isnan().all()


def test_the_device_is_asked_once_which_rows_are_supervised():
    class OnADevice:
        device, asked = torch.device("cpu"), 0

        def __len__(self):
            return 64

        def cpu(self):
            self.asked += 1
            return torch.arange(64).fmod(59) != 5  # without rows 5 and 64

    mask_T = OnADevice()
    pieces = list(rows.runs(mask_T, 3))
    assert len(pieces) == 21 and mask_T.asked == 1
    assert [i for i, piece in enumerate(pieces) if not isinstance(piece, slice)] == [1]  # 3, 4, 6
    assert list(rows.runs(mask_T, 30, all_of_them=True)) == [slice(0, 30), slice(30, 60), slice(60, 64)]
    assert mask_T.asked == 1
    numbers = torch.arange(64)
    assert torch.equal(torch.cat([numbers[piece] for piece in pieces]), numbers[mask_T.cpu()])


def all_ids(rank, ranks, mode):
    """Whether the fused layer does the same when it is told that no label is -100."""
    hidden_TH, weight_WH, shard = head(rank, ranks)
    targets, labels_T = select_top_k(hidden_TH.flip(0) @ weight_WH.T, K, shard), labels_with_gaps().clamp(min=0)
    results = []
    for told in (False, True):
        hidden, weight = hidden_TH.clone().requires_grad_(), weight_WH.clone().requires_grad_()
        options = dict(mode, block_tokens=3, ce_weight=0.3, all_supervised=told)
        loss_T = linear_kd_loss(hidden, weight, targets, labels_T, shard, **options).loss_T
        loss_T.sum().backward()
        results.append((loss_T.detach(), hidden.grad, weight.grad))
    labels_T[7] = -100
    with pytest.raises(ValueError, match="label -100 in row 7, though all_supervised"):
        linear_kd_loss(hidden_TH, weight_WH, targets, labels_T, shard, **options)
    return [torch.equal(*pair) for pair in zip(*results, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_caller_may_say_that_no_label_is_masked(ranks, mode):
    assert on_ranks(ranks, all_ids, mode) == [[True] * 3] * ranks


def test_blocks_are_longer_where_launches_cost():
    hidden_TH, weight_WH, shard, _, _ = one_rank()
    assert check_head(hidden_TH, weight_WH, shard, None, None) == 1024
    assert check_head(hidden_TH.to("meta"), weight_WH.to("meta"), shard, None, None) == 4096
    assert check_head(hidden_TH.to("meta"), weight_WH.to("meta"), shard, None, 7) == 7


def peak_bytes(run):
    """Most bytes that were allocated at one time while `run` ran, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class SumsBesideProducts(TorchDispatchMode):
    """Matrix products as oneDNN runs them on a CPU without bfloat16 instructions: with float32 sums of their own."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        beside = None
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = arguments[-2:]
            if left.dtype == torch.bfloat16:
                beside = torch.empty(len(left), right.shape[1])
        result = function(*arguments, **(options or {}))
        del beside
        return result


@pytest.mark.parametrize("sums_beside", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_two_blocks_whatever_the_number_of_tokens(mode, sums_beside, monkeypatch):
    size, hidden_size, block = 8192, 100, 16
    working_set = 4 * (size + 1)  # of fp32, one row at a time
    monkeypatch.setattr(rows, "BLOCK_BYTES", working_set)
    block_bytes = block * size * 2
    shard = VocabShard(0, size, size)
    weight_WH = torch.randn(size, hidden_size).bfloat16().requires_grad_()
    weight_WH.main_grad = torch.zeros(size, hidden_size)
    with torch.no_grad():  # what this machine's library takes for the products of one block
        logits_BW, half_WH = torch.randn(block, size).bfloat16(), weight_WH[: size // 2]
        hidden_BH, out_BW = torch.randn(block, hidden_size).bfloat16(), logits_BW[:, : size // 2]
        library = max(
            peak_bytes(lambda: logits_BW @ weight_WH), peak_bytes(lambda: torch.mm(hidden_BH, half_WH.T, out=out_BW))
        )
    machine = SumsBesideProducts() if sums_beside else contextlib.nullcontext()
    for tokens in (64, 256):
        hidden_TH = torch.randn(tokens, hidden_size).bfloat16().requires_grad_()
        labels_T = torch.arange(tokens)
        with torch.no_grad():
            targets = linear_select_top_k(hidden_TH, weight_WH, K, shard, block_tokens=block)

        def step(hidden_TH=hidden_TH, labels_T=labels_T, targets=targets):
            options = dict(accumulate_into_main_grad=True, block_tokens=block, **mode)
            with machine:
                linear_kd_loss(hidden_TH, weight_WH, targets, labels_T, shard, **options).loss_T.sum().backward()

        step()
        small = 40 * tokens * (K + 20) + 4 * tokens * hidden_size  # a few numbers per token and entry; gradient
        peak = peak_bytes(step)
        assert peak <= block_bytes + max(block_bytes, library) + 3 * working_set + small, (tokens, peak / block_bytes)
        assert peak - library < tokens * size * 2 / 4 or tokens == 64


def test_a_weight_gradient_of_one_block_has_no_second_beside_it():
    tokens, size, hidden_size = 16, 512, 2048
    weight_WH = torch.randn(size, hidden_size).bfloat16().requires_grad_()
    hidden_TH, labels_T = torch.randn(tokens, hidden_size).bfloat16(), torch.arange(tokens)
    shard = VocabShard(0, size, size)
    targets = linear_select_top_k(hidden_TH, weight_WH, K, shard)

    def step():
        weight_WH.grad = None
        with SumsBesideProducts():
            linear_kd_loss(hidden_TH, weight_WH, targets, labels_T, shard).loss_T.sum().backward()

    step()
    assert peak_bytes(step) <= 2 * size * hidden_size + 2 * rows.BLOCK_BYTES


def test_dense_form_agrees_where_k_is_the_vocabulary():
    """Two kernels that share little: all entries kept, and no entries chosen."""
    student, teacher, labels_T = draw(7, V)
    shard = VocabShard(0, V, V)
    for divergence in DIVERGENCES:
        grads = []
        for dense in (False, True):
            leaf = student.clone().requires_grad_()
            target = (teacher,) if dense else (select_top_k(teacher, V, shard, 2.0),)
            options = dict(divergence=divergence, ce_weight=0.3, **(dict(temperature=2.0) if dense else {}))
            outputs = (dense_kd_loss if dense else kd_loss)(leaf, *target, labels_T, shard, **options)
            outputs.loss_T.sum().backward()
            grads.append(leaf.grad)
        assert_close(*grads, atol=1e-6, rtol=1e-5)
