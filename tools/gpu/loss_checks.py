"""What check_kernels.py holds the dense, the sampled and the fused loss and the soft cap to: float64 by autograd.

A problem is one of kernel_checks.py.
"""

import os

import torch

from megakd.divergences import DIVERGENCES
from megakd.kernels import VocabShard, dense_kd_loss, kd_loss_reference, linear_kd_loss, sample_targets, select_top_k
from megakd.kernels.paths import softcap_passes

INF = float("inf")
# One rounding to the output's dtype. Triton's interpreter cuts bits off instead of rounding, when it stores bf16.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
if os.environ.get("TRITON_INTERPRET") == "1":
    ROUNDING[torch.bfloat16] = 2.0**-7
HIDDEN = 64


def off(got: torch.Tensor, want: torch.Tensor, relative: float, absolute=0.0) -> float:
    """The largest |got - want| as a share of what is allowed; equal infinities are no error, NaN is infinite."""
    got, want = got.double(), want.double()
    error = torch.where(got == want, 0.0, (got - want).abs() / (relative * want.abs() + absolute + 1e-300))
    return float(error.nan_to_num(nan=INF).max()) if error.numel() else 0.0


def off_by_norm(got: torch.Tensor, want: torch.Tensor, relative: float) -> float:
    """|got - want| over relative |want|, as vectors: for sums of products, whose terms cancel."""
    size = relative * want.double().norm() + 1e-30
    return float(((got.double() - want.double()).norm() / size).nan_to_num(nan=INF))


def finite_rows(p) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, VocabShard]:
    """A problem's student and teacher where both are finite, labels, and the shard."""
    on = p.on & p.x[:, : p.width].isfinite().all(1) & p.teacher[:, : p.width].isfinite().all(1)
    return p.x[on], p.teacher[on], p.labels[on].clamp(min=0), VocabShard(0, p.x.shape[1], p.width)


def check_dense(p) -> float:
    """Loss and gradient of every divergence over the whole vocabulary, in place."""
    x, teacher, labels, shard = finite_rows(p)
    errors = [0.0]
    for divergence in DIVERGENCES:
        leaf, exact = x.clone().requires_grad_(), x.double()[:, : p.width].requires_grad_()
        options = {"divergence": divergence, "ce_weight": 0.3}
        got = dense_kd_loss(leaf, teacher, labels, shard, temperature=p.temperature, inplace_backward=True, **options)
        whole = VocabShard(0, p.width, p.width)
        targets = select_top_k(teacher[:, : p.width].float(), p.width, whole, p.temperature)
        want = kd_loss_reference(exact, targets, labels, whole, **options).loss_T
        fine = want.isfinite()
        got.loss_T[fine].sum().backward()
        want[fine].sum().backward()
        largest = want[fine].abs().amax() if fine.any() else 0.0
        errors.append(off(got.loss_T[fine], want[fine], 2e-5, 1e-5 + 1e-6 * largest))
        row = exact.grad.abs().amax(1, keepdim=True)
        errors.append(
            off(leaf.grad[fine, : p.width], exact.grad[fine], ROUNDING[p.dtype] + 1e-4, 1e-4 * row[fine] + 1e-6)
        )
    return max(errors)


def check_sampling(p) -> float:
    """Draws that have a probability, weights that sum to 1, and the exact entropy."""
    _, teacher, _, shard = finite_rows(p)
    generator = torch.Generator(teacher.device).manual_seed(1)
    targets = sample_targets(teacher, 50, shard, generator, p.temperature)
    log_p = (teacher[:, : p.width].double() / p.temperature).log_softmax(1)
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(1)
    drawn = log_p.gather(1, targets.ids_TK.clamp(min=0))[targets.ids_TK >= 0]
    return max(
        off(targets.entropy_T, entropy, 1e-5, 1e-5),
        off(targets.logprobs_TK.exp().sum(1), torch.ones_like(entropy), 1e-5),
        0.0 if bool((drawn > -60).all()) else INF,
    )


def check_head(p) -> float:
    """The fused layer, soft-capped and not, with both ways to form its gradients."""
    x, teacher, labels, shard = finite_rows(p)
    generator = torch.Generator(x.device).manual_seed(2)
    hidden = torch.randn(len(x), HIDDEN, generator=generator, device=x.device).to(p.dtype)
    weight = (torch.randn(x.shape[1], HIDDEN, generator=generator, device=x.device) * 0.3).to(p.dtype)
    targets, errors = select_top_k(teacher, p.top_k, shard, p.temperature), [0.0]
    relative = 1e-4 if p.dtype == torch.float32 else 8 * ROUNDING[p.dtype]
    for softcap in (None, 3.0):
        exact = [leaf.double().requires_grad_() for leaf in (hidden, weight)]
        logits = exact[0] @ exact[1].T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        kd_loss_reference(logits, targets, labels, shard, ce_weight=0.3).loss_T.sum().backward()
        for in_forward in (False, True):
            leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight)]
            options = {"softcap": softcap, "gradient_in_forward": in_forward, "block_tokens": 2, "ce_weight": 0.3}
            linear_kd_loss(*leaves, targets, labels, shard, **options).loss_T.sum().backward()
            errors += [off_by_norm(a.grad, b.grad, relative) for a, b in zip(leaves, exact, strict=True)]
    return max(errors)


def check_softcap(p) -> float:
    """The cap and its derivative, of all rows: minute, infinite and not a number too."""
    raw, grad = p.x, torch.ones_like(p.x)
    out = torch.empty_like(raw)
    softcap_passes(raw).cap(raw, 3.0, out)
    softcap_passes(raw).uncap(raw, 3.0, grad)
    rows, rounding = p.on, ROUNDING[p.dtype] + 2e-6
    u = raw[rows, : p.width].double() / 3
    smallest = 2.0**-24 if p.dtype == torch.float16 else 1e-37
    return max(
        off(out[rows, : p.width], 3 * u.tanh(), rounding, smallest),
        off(grad[rows, : p.width], 1 / u.cosh().square(), rounding + 1e-6 * 90, smallest),
    )


CHECKS = (check_dense, check_sampling, check_head, check_softcap)
