"""What finders of candidates share: an order of floats, slots for those that are kept, and what becomes of the others.

Sizes: M candidates of a row at most; S, N, E in tiles.
"""

import triton
import triton.language as tl

CROWDED = tl.constexpr(1.0)  # the state of a row whose candidates did not fit; 0 otherwise


@triton.jit
def ordered(x):
    """Integers in the order of the floats; -0 is 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def find_slots(flag_SNE):
    """A slot for each flag that is set, from 0 on, lane by lane; and their number."""
    flag_SNE = flag_SNE.to(tl.int32)
    count_SN = tl.sum(flag_SNE, 2)
    count_N = tl.sum(count_SN, 0)
    before_SN = (tl.cumsum(count_N, 0) - count_N)[None, :] + tl.cumsum(count_SN, 0) - count_SN
    return before_SN[:, :, None] + tl.cumsum(flag_SNE, 2) - 1, tl.sum(count_N, 0)


@triton.jit
def empty_slots(columns, values, found, broken, M: tl.constexpr):
    """Empties the slots from `found` on; with NaN in a row that is not finite."""
    m = tl.arange(0, M)
    nothing = tl.where(broken, float("nan"), -float("inf")).to(values.dtype.element_ty)
    tl.store(columns + m, tl.full((M,), -1, tl.int32), mask=m >= found)
    tl.store(values + m, tl.zeros((M,), values.dtype.element_ty) + nothing, mask=m >= found)


@triton.jit
def store_rest(rest, tokens, max_, sum_, at_one, state, AT_ONE: tl.constexpr):
    tl.store(rest, max_)
    tl.store(rest + tokens, sum_)
    if AT_ONE:
        tl.store(rest + 2 * tokens, at_one)
    tl.store(rest + 3 * tokens, state)
