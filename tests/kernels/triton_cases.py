"""The Triton row passes against `megakd.kernels.rows` and float64: run by test_triton.py, in a process of their own.

Under TRITON_INTERPRET=1 (which must be set before Triton is first imported) on the CPU, and without it on a GPU.
Outputs are poisoned: torch.empty is full of NaN here.
"""

import dataclasses
import os

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import (
    VocabShard,
    kd_loss,
    kd_loss_reference,
    records,
    rows,
    sample_targets,
    select_top_k,
    selection,
    selection_rows,
    terms,
)
from megakd.kernels.divergences import TAILS, mixes
from megakd.kernels.predictions import predict
from megakd.kernels.triton import rows as triton_rows
from megakd.kernels.triton import selection_rows as triton_selection
from megakd.kernels.triton import tiles as triton_tiles
from megakd.targets import TeacherTargets
from tests.kernels.dense import dense_targets

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# NaN and infinity in the logits are part of the cases; numpy, which the interpreter computes with, remarks on them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic:UserWarning")

WIDTHS = [1, 101, 127, 128, 129, 4099]
ALIGNED = "aligned"  # padding to a multiple of 16 columns: neighbours are loaded together, as in every real model
# One rounding to the output's dtype. The interpreter cuts the last bits off instead of rounding, when it stores bf16.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}  # below it there is nothing to round to


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)  # the poison is what is wanted of it
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case(width, top_k, dtype, padding):
    """Logits [7, W + padding], columns [7, K], label columns [7], supervised [7]; row by row: plain, masked and full of
    NaN, three levels, -inf here and there, 1e4 apart, all equal, one 250 above the rest."""
    aligned = padding == ALIGNED
    padding = -width % 16 or 16 if aligned else padding
    neighbours = triton_tiles.lane_shape(torch.empty(7, width + padding, dtype=dtype))["E"]
    assert neighbours == (16 // dtype.itemsize if aligned else 1)
    generator = torch.Generator().manual_seed(width * 1000 + top_k)
    x = 3 * torch.randn(7, width + padding, generator=generator)
    x[1] = torch.nan
    x[2] = (x[2] / 3).round().clamp(-1, 1)
    x[3, torch.rand(width + padding, generator=generator) < 0.3] = -torch.inf
    x[4] = (x[4] > 0) * 2e4 - 1e4
    x[5] = 0.25
    x[6, width // 2] = 250.0
    x[:, width:] = torch.nan
    columns = torch.stack([torch.randperm(width, generator=generator)[:top_k] for _ in range(7)])
    columns[torch.rand(7, top_k, generator=generator) < 0.2] = -1
    columns[0, 0] = width - 1
    columns[0, 1:][columns[0, 1:] == width - 1] = -1
    labels = torch.randint(0, width, (7,), generator=generator)
    labels[0], labels[2] = -1, columns[2, 0]
    supervised = torch.arange(7) != 1
    return (part.to(DEVICE) for part in (x.to(dtype), columns, labels, supervised))


def case_list():
    """(width, padding, K, temperature, dtype, programs): every width with every K."""
    for width in WIDTHS:
        for top_k in dict.fromkeys(k for k in (1, 8, 100, width) if k <= min(width, 1024)):
            kinds = [(1.0, torch.bfloat16), (2.0, torch.float32)]
            if top_k == 8:
                kinds += [(2.0, torch.bfloat16), (1.0, torch.float32), (2.0, torch.float16)]
            for temperature, dtype in kinds:
                for programs in (1, 8192) if (width, top_k) == (4099, 8) else (8192,):
                    for padding in (3, ALIGNED) if top_k in (1, 8) else (ALIGNED,):
                        yield width, padding, top_k, temperature, dtype, programs


CASES = list(case_list())


def case_name(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("width, padding, top_k, temperature, dtype, programs", CASES, ids=case_name)
def test_statistics(width, padding, top_k, temperature, dtype, programs, monkeypatch):
    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    x, columns, labels, supervised = case(width, top_k, dtype, padding)
    got = triton_rows.statistics(x, columns, labels, supervised, width, temperature)
    want = rows.statistics(x, columns, labels, supervised, width, temperature)
    for name in ("max_T", "entry_logits_TK", "label_logit_T"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert_close(got.sum_T, want.sum_T, rtol=1e-6, atol=0)
    outside = torch.where(supervised[:, None], x[:, :width].double(), -torch.inf)
    outside = torch.nn.functional.pad(outside, (0, 1)).scatter(1, columns.where(columns >= 0, width), -torch.inf)[
        :, :-1
    ]
    gap = outside - rows.finite(outside.amax(1, keepdim=True))
    assert_close(got.sum_T.double(), (gap / temperature).exp().sum(1), rtol=1e-6, atol=0)
    if temperature == 1:
        assert got.sum_at_one_T is None
    else:
        assert_close(got.sum_at_one_T.double(), gap.exp().sum(1), rtol=1e-6, atol=0)


def assert_near(got, want, relative, absolute):
    """Within float32 arithmetic (exp of a large gap is off by more) and a rounding; per row."""
    got, want = got.double(), want.double()
    largest = want.abs().amax(1, keepdim=True)
    wrong = ~((got - want).abs() <= (relative + 3e-6) * want.abs() + absolute + 2e-7 * largest)
    assert not wrong.any(), (wrong.nonzero()[:5], got[wrong][:5], want[wrong][:5])


@pytest.mark.parametrize("width, padding, top_k, temperature, dtype, programs", CASES, ids=case_name)
def test_backward(width, padding, top_k, temperature, dtype, programs, monkeypatch):
    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    x, columns, labels, supervised = case(width, top_k, dtype, padding)
    top = rows.statistics(x, columns, labels, supervised, width, 1.0).max_T
    generator = torch.Generator().manual_seed(width)
    random = (torch.randn(4, 7, top_k, generator=generator) * 0.1).to(DEVICE)
    outside, outside_at_one, label_grad = random[:3, :, 0].contiguous()
    if temperature == 1:
        outside_at_one = None
    arguments = (columns, labels, supervised, width, temperature, rows.finite(top), outside, outside_at_one, random[3],
                 label_grad)  # fmt: skip
    got, want = torch.empty_like(x), torch.empty_like(x)
    triton_rows.backward(x, *arguments, got)
    rows.backward(x.double().to(x.dtype), *arguments, want)
    assert_near(got, want, 2 * ROUNDING[dtype], SMALLEST[dtype])
    assert not got[1].any() and not got[:, width:].any()

    gap = x[:, :width].double() - rows.finite(top)[:, None]
    exact = outside[:, None] * (gap / temperature).exp()
    if outside_at_one is not None:
        exact += outside_at_one[:, None] * gap.exp()
    exact.scatter_add_(1, labels.clamp(min=0)[:, None], (label_grad * (labels >= 0)).double()[:, None])
    exact = torch.nn.functional.pad(exact, (0, 1)).scatter(1, columns.where(columns >= 0, width), random[3].double())
    exact = exact[:, :width].where(supervised[:, None], 0)
    assert_near(got[:, :width], exact, ROUNDING[dtype], SMALLEST[dtype])

    triton_rows.backward(x, *arguments, x)
    assert torch.equal(x, got)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("padding", [3, ALIGNED])
@pytest.mark.parametrize("dtype, programs", [(torch.float32, 1), (torch.bfloat16, 8192)], ids=case_name)
def test_extremes(width, padding, dtype, programs, monkeypatch):
    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    x, _, labels, _ = case(width, 1, dtype, padding)
    got, want = triton_rows.extremes(x, labels, width), rows.extremes(x, labels, width)
    clean = torch.arange(7) != 1
    for name in ("max_T", "column_T", "label_logit_T"):
        assert torch.equal(getattr(got, name)[clean], getattr(want, name)[clean]), name
    assert torch.equal(got.column_T[clean], (x[clean, :width] == got.max_T[clean, None]).int().argmax(1))
    assert_close(got.sum_T, want.sum_T, rtol=1e-6, atol=0, equal_nan=True)
    assert got.sum_T[1].isnan() and 0 <= got.column_T[1] < width


@pytest.mark.parametrize(
    "width, chunks", [(101, 101), (101, 7), (101, 1), (128, 16), (97, 50), (4099, 33), (4099, 2048)]
)
@pytest.mark.parametrize("temperature, dtype", [(1.0, torch.bfloat16), (2.0, torch.float32)], ids=case_name)
def test_summarize(width, chunks, temperature, dtype):
    x, *_ = case(width, 1, dtype, 3)
    x[0, width - 1] = torch.inf
    got, want = (path.summarize(x, width, chunks, temperature) for path in (triton_rows, rows))
    broken = torch.isin(torch.arange(7), torch.tensor([0, 1, 3]))
    assert got[0][broken].isnan().all()
    assert torch.equal(got[0][~broken], want[0][~broken])
    assert_close(got[1][~broken], want[1][~broken], rtol=1e-6, atol=0)


def test_logits_of_any_stride_and_size():
    """Transposed logits, a slice of wider ones, no rows, no columns, no entries, and rows 2^31 elements apart."""
    x, columns, labels, supervised = case(101, 8, torch.bfloat16, 3)
    want = triton_rows.statistics(x, columns, labels, supervised, 101, 1.0)
    wide = torch.full((7, 112), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, :104] = x
    torch.use_deterministic_algorithms(False)  # poison would touch all of it
    far = torch.empty(3 << 30, dtype=x.dtype, device=DEVICE).as_strided((3, 104), (1 << 30, 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    far.copy_(x[[0, 2, 3]])
    for y, some in ((x.T.contiguous().T, range(7)), (wide[:, :104], range(7)), (far, [0, 2, 3])):
        arguments = columns[some], labels[some], supervised[some], 101, 1.0
        got = triton_rows.statistics(y, *arguments)
        for a, b in zip(got, want, strict=True):
            assert a is b is None or assert_close(a, b[some], rtol=1e-6, atol=0) is None
        ones_T, out = torch.ones(len(y), device=DEVICE), torch.empty_like(x[some])
        factors = rows.finite(got.max_T), ones_T, None, torch.zeros(len(y), 8, device=DEVICE), ones_T
        triton_rows.backward(y, *arguments, *factors, out)
        triton_rows.backward(y, *arguments, *factors, y)
        assert torch.equal(out, y)
    none = triton_rows.statistics(x[:0], columns[:0], labels[:0], supervised[:0], 101, 2.0)
    assert [len(part) for part in none] == [0] * 5
    none = triton_rows.statistics(x, columns[:, :0], labels.new_full((7,), -1), supervised, 0, 1.0)
    assert none.max_T.isneginf().all() and not none.sum_T.any() and none.label_logit_T.isneginf().all()
    out = torch.empty_like(x)
    ones_T = torch.ones(7, device=DEVICE)
    triton_rows.backward(x, columns[:, :0], labels, supervised, 0, 1.0, ones_T, ones_T, None, columns[:, :0].float(),
                         ones_T, out)  # fmt: skip
    assert not out.any()


def teacher(width, top_k, dtype, padding=3):
    """Logits [6, W + padding]: plain, many ties, crowded at the top, all equal, 1e4 apart, all negative."""
    x = 3 * torch.randn(6, width + padding, generator=torch.Generator().manual_seed(width + top_k))
    x[1] = (2 * x[1]).round() / 2
    x[2] = x[2].round().clamp(max=3)
    x[3] = -7.0
    x[4] *= 3e3
    x[5] = -x[5].abs() - 1
    x[:, width:] = torch.nan
    return x.to(dtype).to(DEVICE)


SELECTIONS = [
    (101, 8, 1.0, torch.bfloat16),  # too narrow for chunks
    (144, 8, 1.0, torch.bfloat16),
    (4099, 1, 2.0, torch.float32),
    (4099, 8, 1.0, torch.bfloat16),
    (4109, 8, 2.0, torch.float32),  # with padding, rows start at 16 bytes
    (4109, 100, 1.0, torch.bfloat16),
]


@pytest.mark.parametrize("width, top_k, temperature, dtype", SELECTIONS, ids=case_name)
def test_select_top_k(width, top_k, temperature, dtype, monkeypatch):
    monkeypatch.setattr(triton_selection, "SCRATCH_BYTES", 8 * 3 * 256)  # several blocks of rows
    x, shard = teacher(width, top_k, dtype), VocabShard(0, width + 3, width)
    chunked = isinstance(triton_selection.scan_rows(x, top_k, shard, 1.0), triton_selection.Scan)
    assert chunked == (width > 101)
    got = select_top_k(x, top_k, shard, temperature)
    ids, log_p, tail = dense_targets(x[:, :width], top_k, temperature)
    assert torch.equal(got.ids_TK, ids)
    assert_close(got.logprobs_TK.double(), log_p, atol=2e-6, rtol=1e-6)
    assert_close(got.log_tail_T.double(), tail, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_teacher_row_is_named(bad):
    x = teacher(1009, 8, torch.bfloat16)
    x[4, 1008] = bad
    with pytest.raises(ValueError, match="in 1 of 6 rows, first in row 4"):
        select_top_k(x, 8, VocabShard(0, 1012, 1009))


def test_two_shards_share_the_ties():
    """The passes on the halves of a vocabulary, with the threshold of both: what PyTorch takes from each."""
    x, half, top_k = teacher(8198, 8, torch.bfloat16), 4099, 8
    halves, shard = (x[:, :half], x[:, half : 2 * half]), VocabShard(0, half, half)
    scans = [triton_selection.scan_rows(part, top_k, shard, 1.0) for part in halves]
    values = torch.stack([scan.values_TL for scan in scans])
    assert values.dtype == x.dtype and values.shape == (2, 6, top_k)
    ids = []
    for rank, (part, scan) in enumerate(zip(halves, scans, strict=True)):
        agreed = selection.share(values, top_k, rank)
        got = triton_selection.take_entries(part, scan, *agreed, top_k, 1.0)
        want = selection_rows.take_entries(part, selection_rows.scan_rows(part, top_k, shard, 1.0), *agreed, top_k, 1.0)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1][:, ::2], want[1][:, ::2])
        assert_close(got[1], want[1], rtol=1e-6, atol=0)
        ids.append(torch.where(got[0] >= 0, got[0] + rank * half, 8198))
    assert torch.equal(torch.cat(ids, 1).sort(1).values[:, :top_k], dense_targets(x[:, :8198], top_k)[0])


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

    def __init__(self, parts, size, records_RTL):
        self.start, self.real_width, self.size, self.records_RTL = 0, parts, size, records_RTL

    def columns(self, ids):
        return torch.where((ids >= 0) & (ids < self.real_width), ids, -1)

    def all_gather(self, mine):
        assert mine.shape == self.records_RTL.shape[1:]
        return torch.cat([mine[None], self.records_RTL[1:]])


def same_steps(divergence, tail, temperature, sampled, weights, use_triton, monkeypatch):
    """Everything around the row passes, for two slices of a vocabulary of 300 of which the first holds 200; and for
    divergences that mix P and Q, the factors of the backward alone."""
    top_k, tokens, size, split = 9, 7, 300, 200
    if not use_triton:
        monkeypatch.setattr(terms, "fused_terms", lambda x: None)
        monkeypatch.setattr(records, "fused_terms", lambda x: None)
    generator = torch.Generator().manual_seed(top_k)
    x = 3 * torch.randn(tokens, size, generator=generator)
    x[2, :split] = -torch.inf  # nothing on the first slice
    x[3, 4] = 300.0
    ids = torch.stack([torch.randperm(size, generator=generator)[:top_k] for _ in range(tokens)]).sort(1).values
    ids[4] = torch.arange(split, split + top_k)  # no entry on the first slice
    log_p = torch.log_softmax(3 * torch.randn(tokens, top_k + 1, generator=generator), 1)
    log_p[5, -1] = -torch.inf
    log_p[5] = log_p[5].log_softmax(0)
    if sampled:
        log_p = torch.cat([log_p[:, :-1].log_softmax(1), torch.full((tokens, 1), -torch.inf)], 1)
    labels = torch.tensor([3, 250, 7, -100, int(ids[4, 2]), 299, 0])
    entropy = torch.rand(tokens, generator=generator) if sampled else None
    x, ids, log_p, labels, entropy = (
        part if part is None else part.to(DEVICE) for part in (x, ids, log_p, labels, entropy)
    )
    targets = TeacherTargets(ids, log_p[:, :-1].contiguous(), log_p[:, -1].contiguous(), temperature, entropy)
    options = terms.Options(divergence, tail, 0.3, temperature, *weights, sampled)
    parts, stats, sent = [], [], []
    for first, last in ((0, split), (split, size)):
        shard = Slices(last - first, size, None)
        local = dataclasses.replace(targets, ids_TK=torch.where(ids >= first, ids - first, -1))
        own = torch.where((labels >= first) & (labels < last), labels - first, -1).where(labels != -100, -100)
        s = terms.localize(local, own, shard)
        on, width = labels != -100, last - first
        stats.append(triton_rows.statistics(x[:, first:last], s.columns_TK, s.label_columns_T, on, width, temperature))
        sent.append(records.build_record(stats[-1], s.logprobs_TK, temperature, sampled=sampled))
        parts.append(s._replace(supervised_T=on))
    sent = torch.stack(sent)
    if mixes(divergence):
        saved = terms.Saved(*torch.rand(8, tokens, generator=generator, dtype=torch.float64).to(DEVICE))
        outputs = ()
    else:
        outputs, saved = terms.evaluate(
            sent[0], stats[0].entry_logits_TK, parts[0], targets, labels, Slices(split, size, sent), options
        )
        assert not any(part._is_view() for part in outputs)
    grad = torch.rand(tokens, generator=generator).to(DEVICE)
    factors = []
    for part, read in zip(parts, stats, strict=True):
        factors += terms.gradient_factors(grad, read.entry_logits_TK, part, saved, options)
    on = labels != -100
    return parts, sent, outputs, [part[on] for part in saved], [part[on] for part in factors if part is not None]


PAIRS = [(name, tail, False) for name, tails in TAILS.items() for tail in tails[: 1 if mixes(name) else None]]


@pytest.mark.parametrize(
    "weights, temperature", [((0.7, 0.3), 1.0), ((0.7, 0.3), 2.5), ((1.0, 0.0), 2.5), ((0.0, 2.0), 1.0)], ids=str
)
@pytest.mark.parametrize(
    "divergence, tail, sampled", [*PAIRS, ("forward_kl", "drop", True), ("forward_kl", "bucket", True)]
)
def test_the_steps_between_the_passes(divergence, tail, sampled, weights, temperature, monkeypatch):
    with monkeypatch.context() as plain:
        want = same_steps(divergence, tail, temperature, sampled, weights, False, plain)
    got = same_steps(divergence, tail, temperature, sampled, weights, True, monkeypatch)
    for a, b in zip(got[0], want[0], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
    for a, b in zip(got[1:], want[1:], strict=True):
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
        monkeypatch.setattr(terms, "fused_terms", lambda x: None)
    y, labels = teacher(101, 8, torch.float32), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    targets = select_top_k(y, 8, VocabShard(0, 104, 101))
    x = torch.randn(6, 104, device=DEVICE).scatter(1, targets.ids_TK, -torch.inf).requires_grad_()
    loss_T = kd_loss(x, targets, labels, VocabShard(0, 104, 101), tail="renormalize").loss_T
    loss_T.sum().backward()
    assert (loss_T == torch.inf).all() and x.grad.isfinite().all()
