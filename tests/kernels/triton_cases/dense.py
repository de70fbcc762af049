"""dense_kd_loss on these kernels against its definition in float64, and its record against plain PyTorch."""

import pytest
import torch
from torch.testing import assert_close

from megakd.divergences import DIVERGENCES
from megakd.kernels import VocabShard, dense, dense_kd_loss, dense_rows, divergences, paths, terms
from megakd.kernels.triton import dense_rows as triton_dense
from tests.kernels.dense import dense_divergence
from tests.kernels.triton_cases.problems import DEVICE, REMARKS, ROUNDING, SMALLEST, assert_near, case_name

pytestmark = REMARKS
CASES = [(101, 3, torch.float32), (2064, 16, torch.bfloat16), (1, 3, torch.float16)]


def logits(width, padding, dtype):
    """Student, teacher [6, W + padding], labels: plain, a peak of 250, masked and NaN, -inf in the student, 1e4 apart,
    equal models; NaN in the padding."""
    generator = torch.Generator().manual_seed(width)
    x, y = 3 * torch.randn(2, 6, width + padding, generator=generator)
    x[1, width // 2] = 250.0
    x[2] = y[2] = torch.nan
    x[3, 1::5] = -torch.inf
    y[3, 1::5] = -300.0
    x[4] = (x[4] > 0) * 2e4 - 1e4
    y[5] = x[5]
    x[:, width:] = y[:, width:] = torch.nan
    labels = torch.randint(0, width, (6,), generator=generator)
    labels[2] = -100
    labels[3] = 0
    return (part.to(DEVICE) for part in (x.to(dtype), y.to(dtype), labels))


@pytest.mark.parametrize("width, padding, dtype", CASES, ids=case_name)
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.5, 3.0)], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_record(divergence, temperatures, width, padding, dtype):
    x, y, labels = logits(width, padding, dtype)
    y[0, width - 1] = torch.inf
    given = x, y, labels.clamp(min=-1), labels >= 0, width, temperatures, divergence
    got, want = triton_dense.dense_record(*given), dense_rows.dense_record(*given)
    assert got[0, 3].isnan() and want[0, 3].isnan()
    exact = [0, 2, 5]
    assert torch.equal(got[1:, exact], want[1:, exact])
    assert_close(got[1:, [1, 3, 4, 6]], want[1:, [1, 3, 4, 6]], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("width, padding, dtype", CASES, ids=case_name)
@pytest.mark.parametrize("temperature, ce_weight", [(1.0, 0.3), (2.0, 0.3), (2.0, 0.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradient(divergence, temperature, ce_weight, width, padding, dtype):
    one_of_each = divergence in ("forward_kl", "jsd")
    more = (temperature, ce_weight) != (2.0, 0.3)
    if (width == 1 and not one_of_each) or (more and (width > 1000 or not one_of_each)):
        pytest.skip("one of each is enough for what the interpreter takes")
    x, y, labels = logits(width, padding, dtype)
    shard, on = VocabShard(0, width + padding, width), labels >= 0
    weight = torch.arange(1.0, 7.0, device=DEVICE)
    grads = []
    for in_place in (False, True) if one_of_each else (True,):
        leaf = x.clone().requires_grad_()
        whole = leaf * 1
        out = dense_kd_loss(whole, y, labels, shard, divergence=divergence, temperature=temperature,
                            ce_weight=ce_weight, inplace_backward=in_place)  # fmt: skip
        (out.loss_T * weight).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[-1])
    exact = x[on, :width].double().requires_grad_()
    p, q = (y[on, :width].double() / temperature).softmax(1), (exact / temperature).softmax(1)
    kd = dense_divergence(divergence, p, q)
    ce = torch.nn.functional.cross_entropy(exact, labels[on], reduction="none")
    far = kd.isfinite() & (torch.arange(6, device=DEVICE)[on] != 4)  # float64 probabilities of 1e4 apart are 0
    loss = temperature**2 * kd + ce_weight * ce
    (loss * weight[on])[far].sum().backward()
    assert_close(out.loss_T[on][far].double(), loss[far].detach(), rtol=1e-5, atol=2e-5)
    equal = torch.arange(6, device=DEVICE)[on][far] != 5 if divergence == "tvd" else far[far]  # no gradient at p = q
    got = grads[0][on][far][:, :width]
    assert_near(got[equal], exact.grad[far][equal].nan_to_num(0), 2 * ROUNDING[dtype] + 1e-5, 2e-5 + SMALLEST[dtype])
    assert not grads[0][~on].any() and not grads[0][:, width:].any() and grads[0].isfinite().all()


def on_three_ranks(temperatures, divergence):
    """Labels, the ranks' records (one has no real column), and their sums where the divergence has such."""
    x, y, labels = logits(101, 3, torch.float32)
    shares = [((0, 60), labels), ((60, 60), labels - 60), ((60, 101), labels - 60)]
    records = []
    for (first, last), column in shares:
        owned = (column >= 0) & (column < last - first)
        given = column.where(owned, -1), labels >= 0, last - first, temperatures, divergence
        records.append(dense_rows.dense_record(x[:, first:last], y[:, first:last], *given))
    sums = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return labels, torch.stack(records), sums if divergences.mixes(divergence) else None


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.0, 2.0)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_steps_between_the_passes(divergence, weights, monkeypatch):
    temperatures, shard = (1.5, 3.0), VocabShard(0, 104, 101)
    labels, records, sums = on_three_ranks(temperatures, divergence)
    options, on, results = terms.Options(divergence, "bucket", 0.3, 1.5, *weights, False), labels >= 0, []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(paths, "fused", lambda *_: None)
        both = dense.merge(records, temperatures, divergence)
        outputs, u_total = dense.evaluate(both, sums, on, labels, shard, options)
        assert all(not part[~on].any() for part in outputs) and u_total.dtype == torch.float32
        assert not fused or not any(part._is_view() for part in outputs)
        kept = both if divergence != "jsd" else (*both[:5], both.ce_T)  # whose divergence is in the sums
        results.append([*outputs, *(part[on].float() for part in (u_total, *kept))])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_what_is_wrong_is_named_from_the_steps_too():
    labels, records, _ = on_three_ranks((1.0, 1.0), "forward_kl")
    options = terms.Options("forward_kl", "bucket", 0.5, 1.0, 1.0, 0.0, False)

    def evaluate(labels):
        both = dense.merge(records, (1.0, 1.0), "forward_kl")
        return dense.evaluate(both, None, labels != -100, labels, VocabShard(0, 104, 101), options)

    for label in (101, -1):
        with pytest.raises(ValueError, match=f"label {label} in row 1"):
            evaluate(labels.index_fill(0, torch.tensor(1, device=DEVICE), label))
    evaluate(labels)
    records[2, 5, 3] = torch.nan  # the teacher's sum of one rank
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 6 rows, first in row 5"):
        evaluate(labels)
