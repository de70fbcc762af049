"""The row passes against `megakd.kernels.rows` and float64."""

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels import rows
from megakd.kernels.triton import rows as triton_rows
from megakd.kernels.triton import tiles as triton_tiles
from tests.kernels.triton_cases.problems import (
    ALIGNED,
    DEVICE,
    REMARKS,
    ROUNDING,
    SMALLEST,
    WIDTHS,
    assert_near,
    case,
    case_list,
    case_name,
)

pytestmark = REMARKS
CASES = list(case_list())


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
@pytest.mark.parametrize(
    "padding, dtype, programs", [(3, torch.float32, 8192), (ALIGNED, torch.bfloat16, 1)], ids=case_name
)
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
    more = dict(at_one=temperature != 1, drift=chunks != 7, column=chunks != 50)
    got, want = (path.summarize(x, width, chunks, temperature, **more) for path in (triton_rows, rows))
    broken = torch.isin(torch.arange(7), torch.tensor([0, 1, 3]))
    assert got.max_TC[broken].isnan().all()
    assert torch.equal(got.max_TC[~broken], want.max_TC[~broken])
    if chunks != 50:
        assert torch.equal(got.column_TC[~broken], want.column_TC[~broken]) and got.column_TC.dtype == torch.int32
        assert (got.column_TC >= 0).all() and (got.column_TC < width).all()
    for a, b in zip(got[1:4], want[1:4], strict=True):
        assert a is b is None or assert_close(a[~broken], b[~broken], rtol=1e-6, atol=2e-6) is None


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
