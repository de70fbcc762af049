"""`divergences` in Triton: f and u of each divergence, for any number of outcomes, in float32 or float64."""

import triton
import triton.language as tl

from megakd.kernels.triton.tiles import finite


@triton.jit
def logaddexp(a, b):
    top = finite(tl.maximum(a, b))
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def weighted(log_weight, x):
    weight = tl.exp(log_weight)
    return tl.where(weight > 0, weight * x, 0.0)


@triton.jit
def form(log_p, log_q, parameter, DIVERGENCE: tl.constexpr):
    """f and u of a divergence: `divergences.FORMS`."""
    if DIVERGENCE == "forward_kl":
        f, u = weighted(log_p, log_p - log_q), -tl.exp(log_p)
    elif DIVERGENCE == "reverse_kl":
        f = weighted(log_q, log_q - log_p)
        u = f
    elif DIVERGENCE == "jsd":
        log_m = logaddexp(log_p + tl.log(parameter), log_q + tl.log(1 - parameter))
        u = (1 - parameter) * weighted(log_q, log_q - log_m)
        f = parameter * weighted(log_p, log_p - log_m) + u
    elif DIVERGENCE == "skew_forward_kl":
        log_m = logaddexp(log_p + tl.log(parameter), log_q + tl.log(1 - parameter))
        f, u = weighted(log_p, log_p - log_m), (parameter - 1) * weighted(log_p, tl.exp(log_q - log_m))
    else:
        log_m = logaddexp(log_q + tl.log(parameter), log_p + tl.log(1 - parameter))
        f = weighted(log_q, log_q - log_m)
        u = f - parameter * weighted(log_q, tl.exp(log_q - log_m))
    return f, u
