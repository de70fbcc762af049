"""The forms of `megakd.kernels.divergences` in Triton: the same source, compiled with Triton's operations.

Triton has no expm1 and no log1p of its own; here they are good to a few roundings of float32, in float64 too.
"""

from types import FunctionType

import triton
import triton.language as tl

from megakd.kernels import divergences


@triton.jit
def expm1(x):
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    s = x / (2 + x)  # log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + ...)
    square = s * s
    near = 2 * s * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square / 11)))))
    return tl.where(tl.abs(x) < 0.3, near, tl.log(1 + x))


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def at_least(x, bound):
    return tl.maximum(x, bound)


@triton.jit
def at_most(x, bound):
    return tl.minimum(x, bound)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


OPERATIONS = (absolute, at_least, at_most, exp, expm1, log1p, where)


def compile_forms() -> dict:
    """Each form, and what forms call, as a Triton function."""
    names = {"tl": tl, "__name__": __name__, **{f.__name__: f for f in OPERATIONS}}
    for function in (*divergences.SHARED, *divergences.FORMS.values()):
        names[function.__name__] = triton.jit(FunctionType(function.__code__, names, function.__name__))
    return {name: names[name] for name in divergences.FORMS}


FORMS = compile_forms()
