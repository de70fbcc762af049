"""What check_kernels.py holds the Triton kernels to: float64 on the same device, and plain PyTorch where it is exact.

Every check gives the largest error as a share of what is allowed. Outputs are poisoned: torch.empty is full of NaN.
"""

import argparse
import traceback
import warnings
from collections.abc import Callable

import loss_checks
import torch
from loss_checks import INF, ROUNDING, off

from megakd.divergences import DIVERGENCES
from megakd.kernels import VocabShard, kd_loss, kd_loss_reference, rows, select_top_k
from megakd.kernels.predictions import predict
from megakd.kernels.selection import select_and_predict
from megakd.kernels.triton import rows as triton_rows


def run_checks(options: argparse.Namespace, emit: Callable[[dict], None]) -> None:
    """A row for each check and problem, with the largest error as a share of what is allowed."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    device = options.device
    for check in CHECKS:
        for width, top_k, dtype, temperature, aligned in problems(options.tiny):
            if check in (check_loss, *loss_checks.CHECKS) and width > 5000:
                continue  # their float64 truth is by autograd over the whole vocabulary
            detail = f"W={width} K={top_k} {str(dtype)[6:]} temperature {temperature:g}{', aligned' * aligned}"
            emit(judge(check, detail, Problem(device, width, top_k, dtype, temperature, aligned)))
    if not options.tiny:
        emit(judge(check_far, "3 * 2^30 elements apart", device))


def problems(tiny: bool) -> list[tuple]:
    """(width, K, dtype, temperature, rows start at 16 bytes).

    Every one of these meets every other's kinds, but not in every combination: each is a kernel to compile. What real
    runs have (bfloat16, a wide and aligned shard) comes at both temperatures, with few entries and with many.
    """
    if tiny:
        return [(37, 3, torch.bfloat16, 2.0, True)]
    odd = [(1, 1), (101, 8), (127, 100), (128, 64), (129, 1), (4099, 64), (4099, 1024), (151937, 100), (262144, 8)]
    found = [
        (*size, list(ROUNDING)[i % 3], (1.0, 2.0)[i % 2], i % 4 > 1) for i, size in enumerate(odd)
    ]  # 3, 2 and 4 by turns: all pairs within 12
    return found + [(131072, k, torch.bfloat16, t, True) for k in (64, 1024) for t in (1.0, 2.0)]


def judge(check, detail: str, *given) -> dict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            worst = float(check(*given))
    except Exception:  # one that does not run must not keep the others from being reported
        traceback.print_exc()
        worst = INF
    verdict = "right" if worst <= 1 else "WRONG"
    return {"name": check.__name__.removeprefix("check_"), "detail": detail, "worst": worst, "verdict": verdict}


class Problem:
    """Logits [7, W and padding]: masked rows of NaN, ties, -inf, +-1e4, one logit 250 above the rest, NaN padding.

    With `aligned` rows start at multiples of 16 columns, where neighbours are loaded together.
    """

    def __init__(self, device: str, width: int, top_k: int, dtype: torch.dtype, temperature: float, aligned: bool):
        generator = torch.Generator(device=device).manual_seed(width + top_k)
        padding = -width % 16 or 16 if aligned else 3 if (width + 3) % 16 else 4
        x, teacher = 3 * torch.randn(2, 7, width + padding, generator=generator, device=device)
        x[1] = torch.nan
        x[2] = (x[2] / 3).round().clamp(-1, 1)
        x[3, x[3] < -2] = -INF
        x[4] = (x[4] > 0) * 2e4 - 1e4
        x[5] = 0.25
        x[6, width // 2] = 250.0
        x[:, width:] = torch.nan
        teacher[1] = (2 * teacher[1]).round() / 2
        teacher[2] = -7.0
        teacher[3] *= 3e3
        teacher[:, width:] = torch.nan
        self.width, self.top_k, self.dtype, self.temperature = width, top_k, dtype, temperature
        self.x, self.teacher = x.to(dtype), teacher.to(dtype)
        self.columns = torch.rand(7, width, generator=generator, device=device).argsort(1)[:, :top_k].contiguous()
        self.columns[torch.rand(7, top_k, generator=generator, device=device) < 0.2] = -1
        self.labels = torch.randint(0, width, (7,), generator=generator, device=device)
        self.labels[0] = -1
        self.on = torch.arange(7, device=device) != 1
        self.random = 0.1 * torch.randn(4, 7, top_k, generator=generator, device=device)

    @property
    def given(self) -> tuple:
        return self.x, self.columns, self.labels, self.on, self.width, self.temperature

    def scatter(self, onto: torch.Tensor, values) -> torch.Tensor:
        """A [7, W] matrix with other values at the entries."""
        wide = torch.nn.functional.pad(onto, (0, 1))
        index = self.columns.where(self.columns >= 0, self.width)
        return (wide.scatter(1, index, values))[:, :-1]


def same(got: torch.Tensor, want: torch.Tensor) -> float:
    return 0.0 if torch.equal(got, want) else INF


def check_statistics(p: Problem) -> float:
    got, plain = triton_rows.statistics(*p.given), rows.statistics(*p.given)
    outside = p.scatter(p.x[:, : p.width].double().where(p.on[:, None], -INF), -INF)
    gap = outside - rows.finite(outside.amax(1, keepdim=True))
    errors = [same(getattr(got, name), getattr(plain, name)) for name in ("max_T", "entry_logits_TK", "label_logit_T")]
    errors.append(off(got.sum_T, (gap / p.temperature).exp().sum(1), 2e-6))
    if p.temperature != 1:
        errors.append(off(got.sum_at_one_T, gap.exp().sum(1), 2e-6))
    return max(errors)


def check_backward(p: Problem) -> float:
    top = rows.finite(rows.statistics(*p.given).max_T)
    outside, at_one, label_grad = p.random[:3, :, 0].contiguous()
    factors = top, outside, at_one if p.temperature != 1 else None, p.random[3], label_grad
    got = torch.empty_like(p.x)
    triton_rows.backward(*p.given, *factors, got)
    gap = p.x[:, : p.width].double() - top[:, None]
    want = outside[:, None] * (gap / p.temperature).exp()
    if p.temperature != 1:
        want += at_one[:, None] * gap.exp()
    want.scatter_add_(1, p.labels.clamp(min=0)[:, None], (label_grad * (p.labels >= 0)).double()[:, None])
    want = p.scatter(want, p.random[3].double()).where(p.on[:, None], 0)
    absolute = 2e-7 * want.abs().amax(1, keepdim=True) + (2.0**-24 if p.dtype == torch.float16 else 0)
    errors = [
        off(got[:, : p.width], want, ROUNDING[p.dtype] + 5e-6, absolute),
        INF if got[:, p.width :].any() else 0.0,
    ]
    again = p.x.clone()
    triton_rows.backward(again, *p.given[1:], *factors, again)
    return max(*errors, same(again, got))


def check_extremes(p: Problem) -> float:
    got, plain = (path.extremes(p.x, p.labels, p.width) for path in (triton_rows, rows))
    errors = [same(getattr(got, name)[p.on], getattr(plain, name)[p.on]) for name in ("max_T", "label_logit_T")]
    first = (p.x[p.on, : p.width] == got.max_T[p.on, None]).int().argmax(1)
    gap = p.x[p.on, : p.width].double() - got.max_T[p.on, None]
    return max(*errors, same(got.column_T[p.on], first), off(got.sum_T[p.on], gap.exp().sum(1), 2e-6))


def check_summarize(p: Problem) -> float:
    chunks, broken = max(1, round(p.width**0.5)), (p.x[:, : p.width].float() * 0).isnan().any(1)
    more = {"at_one": p.temperature != 1, "drift": True}
    got, plain = (path.summarize(p.x, p.width, chunks, p.temperature, **more) for path in (triton_rows, rows))
    return max(
        0.0 if got.max_TC[broken].isnan().all() else INF,
        same(got.max_TC[~broken], plain.max_TC[~broken]),
        off(got.sum_TC[~broken], plain.sum_TC[~broken], 2e-6),
        off(got.drift_TC[~broken], plain.drift_TC[~broken], 4e-6, 4e-6),
        0.0 if p.temperature == 1 else off(got.sum_at_one_TC[~broken], plain.sum_at_one_TC[~broken], 2e-6),
    )


def check_selection(p: Problem) -> float:
    shard = VocabShard(0, p.x.shape[1], p.width)
    got, said = select_and_predict(p.teacher, p.labels, p.top_k, shard, p.temperature)
    z = p.teacher[:, : p.width].double() / p.temperature
    ids = z.sort(dim=1, descending=True, stable=True).indices[:, : p.top_k].sort(1).values
    log_p, at_one = z.log_softmax(1), (z * p.temperature).log_softmax(1)
    tail = log_p.scatter(1, ids, -INF).logsumexp(1)
    label = at_one.gather(1, p.labels.clamp(min=0)[:, None])[:, 0].where(p.labels >= 0, 0)
    return max(
        same(got.ids_TK, ids),
        same(said.id_T, z.max(1).indices),
        off(got.logprobs_TK, log_p.gather(1, ids), 2e-6, 4e-6),
        off(got.log_tail_T, tail, 2e-6, 4e-6),
        off(said.logprob_T, at_one.amax(1), 2e-6, 4e-6),
        off(said.label_logprob_T, label, 2e-6, 4e-6),
    )


def check_loss(p: Problem) -> float:
    """Loss and gradient of every divergence and tail, in place, against the definition in float64."""
    shard, errors = VocabShard(0, p.x.shape[1], p.width), [0.0]
    targets = select_top_k(p.teacher, p.top_k, shard, p.temperature)
    x, labels = p.x.clone(), p.labels.clamp(min=0)
    x[3] = p.teacher[0]  # without infinities, which some divergences answer with
    labels[1] = -100
    for divergence, tail in ((name, tail) for name, row in DIVERGENCES.items() for tail in row.tails):
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        options = {"divergence": divergence, "tail": tail, "ce_weight": 0.3}
        got = kd_loss(leaf, targets, labels, shard, **options, inplace_backward=True).loss_T
        want = kd_loss_reference(exact, targets, labels, shard, **options).loss_T
        fine = want.isfinite()
        got[fine].sum().backward()
        want[fine].sum().backward()
        absolute = 1e-5 + 1e-6 * want[fine].abs().amax() if fine.any() else 1e-5
        errors.append(off(got[fine], want[fine], 2e-5, absolute))
        largest = exact.grad.abs().amax(1, keepdim=True)
        errors.append(off(leaf.grad[fine], exact.grad[fine], ROUNDING[p.dtype] + 1e-4, 1e-4 * largest[fine] + 1e-6))
    predicted = predict(x, labels, shard).id_T
    return max(*errors, same(predicted[p.on], x[p.on, : p.width].float().max(1).indices))


def check_far(device: str) -> float:
    """Rows whose elements no 32-bit number counts."""
    p = Problem(device, 4099, 8, torch.bfloat16, 1.0)
    torch.use_deterministic_algorithms(False)
    far = torch.empty(3 << 30, dtype=p.dtype, device=device).as_strided((3, 4102), (1 << 30, 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    far.copy_(p.x[[0, 2, 3]])
    given = p.columns[[0, 2, 3]], p.labels[[0, 2, 3]], p.on[[0, 2, 3]], p.width, 1.0
    got, want = triton_rows.statistics(far, *given), triton_rows.statistics(*p.given)
    errors = [off(a, b[[0, 2, 3]], 1e-6) for a, b in zip(got, want, strict=True) if a is not None]
    ones = torch.ones(3, device=device)
    factors, out = (rows.finite(got.max_T), ones, None, got.entry_logits_TK, ones), torch.empty_like(p.x[:3])
    triton_rows.backward(far, *given, *factors, out)
    triton_rows.backward(far, *given, *factors, far)
    return max(*errors, same(far, out))


CHECKS = (
    check_statistics,
    check_backward,
    check_extremes,
    check_summarize,
    check_selection,
    check_loss,
    *loss_checks.CHECKS,
)
