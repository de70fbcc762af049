"""The loss on these kernels against its definition, and the steps between the passes against plain PyTorch."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from torch.testing import assert_close

from megakd.divergences import DIVERGENCES
from megakd.kernels import (
    VocabShard,
    divergences,
    kd_loss,
    kd_loss_reference,
    paths,
    records,
    rows,
    sample_targets,
    select_top_k,
    terms,
)
from megakd.kernels.divergences import mixes
from megakd.kernels.predictions import predict
from megakd.kernels.triton import rows as triton_rows
from megakd.targets import TeacherTargets
from tests.kernels.triton_cases.problems import DEVICE, REMARKS, ROUNDING, assert_near, case_name, teacher

pytestmark = REMARKS


@pytest.mark.parametrize("temperature, dtype", [(1.0, torch.bfloat16), (2.0, torch.float32)], ids=case_name)
def test_the_loss_runs_on_these_passes(temperature, dtype, monkeypatch):
    calls = []
    for f in (triton_rows.statistics, triton_rows.backward, triton_rows.extremes):
        monkeypatch.setattr(triton_rows, f.__name__, lambda *a, f=f: (calls.append(f), f(*a))[1])
    width, shard = 1009, VocabShard(0, 1012, 1009)
    x, y = teacher(width, 8, dtype), teacher(width, 9, dtype)
    labels = torch.tensor([0, 1008, -100, 5, 77, 500], device=DEVICE)
    targets = select_top_k(y, 8, shard, temperature)
    grads = []
    for loss in (kd_loss, kd_loss_reference):
        leaf = x.clone().requires_grad_()
        out = loss(leaf, targets, labels, shard, ce_weight=0.3)
        out.loss_T.sum().backward()
        grads.append((out.loss_T.detach(), leaf.grad))
    assert_close(grads[0][0], grads[1][0], rtol=2e-6, atol=2e-6)
    assert_near(grads[0][1], grads[1][1], 2 * ROUNDING[dtype], 1e-9)
    assert torch.equal(predict(x, labels, shard).id_T, x[:, :width].float().max(1).indices)
    assert len(calls) == 3


class Slices:
    """Two shards of one vocabulary, in one process: stands in for the VocabShard of the first."""

    def __init__(self, parts, size, sent_by_the_second):
        self.start, self.real_width, self.size, self.sent = 0, parts, size, iter(sent_by_the_second)

    def columns(self, ids):
        return torch.where((ids >= 0) & (ids < self.real_width), ids, -1)

    def all_gather(self, mine):
        other = next(self.sent)
        assert mine.shape == other.shape
        return torch.stack([mine, other])


TOP_K, TOKENS, SIZE, SPLIT = 9, 7, 300, 200  # two slices of a vocabulary, the first holding SPLIT


def problem(temperature, sampled):
    """Logits, targets, labels, and a gradient of each token's loss."""
    generator = torch.Generator().manual_seed(TOP_K)
    x = 3 * torch.randn(TOKENS, SIZE, generator=generator)
    x[2, :SPLIT] = -torch.inf  # nothing on the first slice
    x[3, 4] = 300.0
    ids = torch.stack([torch.randperm(SIZE, generator=generator)[:TOP_K] for _ in range(TOKENS)]).sort(1).values
    ids[4] = torch.arange(SPLIT, SPLIT + TOP_K)  # no entry on the first slice
    ids[6] = torch.tensor([0, 40, 80, 120, SPLIT - 1, SPLIT, 250, SIZE - 2, SIZE - 1])  # the slices' first and last
    log_p = torch.log_softmax(3 * torch.randn(TOKENS, TOP_K + 1, generator=generator), 1)
    log_p[5, -1] = -torch.inf
    log_p[5] = log_p[5].log_softmax(0)
    if sampled:
        log_p = torch.cat([log_p[:, :-1].log_softmax(1), torch.full((TOKENS, 1), -torch.inf)], 1)
    labels = torch.tensor([3, 250, 7, -100, int(ids[4, 2]), 299, 0])
    entropy = torch.rand(TOKENS, generator=generator) if sampled else None
    grad = torch.rand(TOKENS, generator=generator)
    x, ids, log_p, labels, entropy, grad = (
        part if part is None else part.to(DEVICE) for part in (x, ids, log_p, labels, entropy, grad)
    )
    targets = TeacherTargets(ids, log_p[:, :-1].contiguous(), log_p[:, -1].contiguous(), temperature, entropy)
    return x, targets, labels, grad


@contextlib.contextmanager
def steps_of(path):
    """The steps around the passes are Triton's, or plain PyTorch's."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "torch":
            patch.setattr(paths, "fused", lambda *_: None)
        yield


@functools.cache  # the divergence, its tail and the weights come later
def before_the_exchange(temperature, sampled, path):
    """What each slice brings along, the passes' results (plain PyTorch's both times), and the records."""
    x, targets, labels, _ = problem(temperature, sampled)
    parts, stats, sent, on = [], [], [], labels != -100
    with steps_of(path):
        for first, last in ((0, SPLIT), (SPLIT, SIZE)):
            local = dataclasses.replace(
                targets, ids_TK=torch.where(targets.ids_TK >= first, targets.ids_TK - first, -1)
            )
            own = torch.where(labels >= first, labels - first, -1).where(on, -100)  # beyond the slice too
            s = terms.localize(local, own, Slices(last - first, SIZE, ()))
            given = x[:, first:last], s.columns_TK, s.label_columns_T, on, last - first, temperature
            stats.append(rows.statistics(*given))
            sent.append(records.build_record(stats[-1], s.logprobs_TK, temperature, sampled=sampled))
            parts.append(s._replace(supervised_T=on))
    return parts, stats, torch.stack(sent)


def after_the_exchange(divergence, tail, temperature, sampled, weights, path):
    """What the first slice makes of both slices' records: outputs, what is saved, and the factors of both gradients."""
    _, targets, labels, grad = problem(temperature, sampled)
    parts, stats, sent = before_the_exchange(temperature, sampled, path)
    options, on = terms.Options(divergence, tail, 0.3, temperature, *weights, sampled), labels != -100
    messages = [sent[1]]
    with steps_of(path):
        if mixes(divergence):
            merged = records.merge_records(sent, temperature)
            compared = divergences.compare(merged, targets.log_tail_T.where(on, 0), tail)
            above = (stats[1].entry_logits_TK - merged.entry_max_T[:, None].float()) / temperature
            logs = divergences.entry_logs(compared, parts[1].logprobs_TK, above)
            messages.append(divergences.entry_sums(divergence, *logs, options.parameter))
        outputs, saved = terms.evaluate(
            sent[0], stats[0].entry_logits_TK, parts[0], targets, labels, Slices(SPLIT, SIZE, messages), options
        )
        assert path == "torch" or not any(part._is_view() for part in outputs)
        factors = []
        for part, read in zip(parts, stats, strict=True):
            factors += terms.gradient_factors(grad, read.entry_logits_TK, part, saved, options)
    return outputs, [part[on] for part in saved], [part[on] for part in factors if part is not None]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_steps_before_the_exchange(sampled, temperature):
    got, want = (before_the_exchange(temperature, sampled, path) for path in ("triton", "torch"))
    for a, b in zip(got[0], want[0], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
    assert_close(got[2], want[2], rtol=2e-6, atol=2e-6, equal_nan=True)


PAIRS = [(name, tail, False) for name, row in DIVERGENCES.items() for tail in row.tails]
PAIRS += [("forward_kl", "drop", True), ("forward_kl", "bucket", True)]
KINDS = [((0.7, 0.3), 2.5), ((0.7, 0.3), 1.0), ((1.0, 0.0), 2.5), ((0.0, 2.0), 1.0)]  # weights, temperature


def steps():
    """Every pair at a temperature. At 1, and with a weight of 0, the kernels of one pair of each way differ."""
    for name, tail, sampled in PAIRS:
        kinds = KINDS if (name, tail) in (("forward_kl", "bucket"), ("jsd", "renormalize")) else KINDS[:1]
        for weights, temperature in KINDS[:2] if tail == "bucket" and len(kinds) == 1 else kinds:
            yield name, tail, sampled, weights, temperature


@pytest.mark.parametrize("divergence, tail, sampled, weights, temperature", list(steps()))
def test_the_steps_after_the_exchange(divergence, tail, sampled, weights, temperature):
    got, want = (
        after_the_exchange(divergence, tail, temperature, sampled, weights, path) for path in ("triton", "torch")
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=2e-6, atol=2e-6, equal_nan=True)  # reverse_kl is infinite where P's tail is 0


def test_what_is_wrong_is_named_from_the_fused_steps_too():
    x, labels = teacher(101, 3, torch.float32), torch.tensor([0, 1, -100, 5, 77, 100], device=DEVICE)
    shard = VocabShard(0, 104, 101)
    targets = select_top_k(teacher(101, 8, torch.float32), 8, shard)
    for row, label in [(3, 101), (4, -1)]:
        stray = labels.clone()
        stray[row] = label
        with pytest.raises(ValueError, match=f"label {label} in row {row}"):
            kd_loss(x, targets, stray, shard)
    targets.logprobs_TK[1] -= 1
    with pytest.raises(ValueError, match="in row 1; expected 1"):
        kd_loss(x, targets, labels, shard)
    targets.logprobs_TK[1] += torch.nan
    with pytest.raises(ValueError, match="in row 1; expected 1"):
        kd_loss(x, targets, labels, shard)


def test_targets_and_logits_of_any_layout():
    """Column views and transposed matrices give what contiguous ones give."""
    width, shard = 1009, VocabShard(0, 1012, 1009)
    x, y = teacher(width, 8, torch.float32), teacher(width, 9, torch.float32)
    labels = torch.tensor([0, 1008, -100, 5, 77, 500], device=DEVICE)
    top = select_top_k(y, 8, shard)
    drawn = sample_targets(y, 16, shard, torch.Generator(DEVICE).manual_seed(0))

    def strided(part):
        return part.T.contiguous().T if part.dim() == 2 else torch.stack([part, part + 1], 1)[:, 0]

    for targets in (top, drawn):
        views = {f.name: getattr(targets, f.name) for f in dataclasses.fields(targets)}
        views = {name: strided(v) if isinstance(v, torch.Tensor) else v for name, v in views.items()}
        results = []
        for given, own in ((targets, labels), (TeacherTargets(**views), strided(labels))):
            leaf = x.clone().requires_grad_()
            out = kd_loss(leaf, given, own, shard, ce_weight=0.3)
            (out.loss_T * 2).sum().backward()
            results.append((out.loss_T.detach(), leaf.grad))
        assert_close(*results, rtol=0, atol=0)


def test_logits_that_share_memory_are_refused_in_place():
    y, labels = teacher(101, 8, torch.float32), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    targets = select_top_k(y, 8, VocabShard(0, 104, 101))
    shared = y[:1].expand(6, -1)
    with pytest.raises(ValueError, match=r"share no memory, not an expanded \[6, 104\]"):
        kd_loss(shared, targets, labels, VocabShard(0, 104, 101), inplace_backward=True)
    kd_loss(shared, targets, labels, VocabShard(0, 104, 101))


@pytest.mark.parametrize("fused", [True, False])
def test_a_student_that_rules_out_all_entries_has_an_infinite_loss_and_a_gradient(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(paths, "fused", lambda *_: None)
    y, labels = teacher(101, 8, torch.float32), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    targets = select_top_k(y, 8, VocabShard(0, 104, 101))
    x = torch.randn(6, 104, device=DEVICE).scatter(1, targets.ids_TK, -torch.inf).requires_grad_()
    loss_T = kd_loss(x, targets, labels, VocabShard(0, 104, 101), tail="renormalize").loss_T
    loss_T.sum().backward()
    assert (loss_T == torch.inf).all() and x.grad.isfinite().all()


def test_reverse_kl_of_a_student_that_rules_out_all_entries_however_low_it_lies():
    ids = torch.tensor([[0, 1]], device=DEVICE)
    log_p = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], device=DEVICE).log_softmax(1)
    targets = TeacherTargets(ids, log_p[:, :2].contiguous(), log_p[:, 2:].logsumexp(1))
    x = torch.full((1, 8), -800.0, device=DEVICE).index_fill(1, ids[0], -torch.inf).requires_grad_()
    labels = torch.tensor([2], device=DEVICE)
    loss_T = kd_loss(x, targets, labels, VocabShard(0, 8, 8), divergence="reverse_kl").loss_T
    loss_T.sum().backward()
    assert_close(loss_T, -targets.log_tail_T)
    assert x.grad.abs().max() < 1e-6
