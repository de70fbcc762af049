"""Loss and gradient of one token by definition, in 60 digits, gradients as differences: nothing of the kernels.

mpmath comes with torch (through sympy). Probabilities may be 0, and logits -inf.
"""

import mpmath
from mpmath import mp, mpf

DIGITS = 60
STEP = mpf(10) ** -25
NONE = mpf(2) ** -150  # a probability that is 0 in float32: no student is blamed for excluding what has it


def divergence_of(name, p, q, a):
    """D of outcomes p and q (lists of mpf that each sum to 1, nearly), a being the divergence's parameter."""
    definitions = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: a * kl(p, mix(p, q, a)) + (1 - a) * kl(q, mix(p, q, a)),
        "skew_forward_kl": lambda: kl(p, mix(p, q, a)),
        "skew_reverse_kl": lambda: kl(q, mix(q, p, a)),
        "alpha": lambda: (
            sum(a * x + (1 - a) * y - power(x, a) * power(y, 1 - a) for x, y in zip(p, q, strict=True)) / (a * (1 - a))
        ),
        "tvd": lambda: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    }
    return definitions[name]()


def kl(p, q):
    some = [(x, y) for x, y in zip(p, q, strict=True) if x > 0]
    if any(y == 0 and x > NONE for x, y in some):
        return mp.inf
    return sum((x * mp.log(x / y) for x, y in some if y > 0), mpf(0))


def mix(p, q, a):
    return [a * x + (1 - a) * y for x, y in zip(p, q, strict=True)]


def power(x, exponent):
    return x**exponent if x > 0 else mpf(0)


def outcomes(z, entries, log_tail, tail):
    """p and q as a tail rule compares them; `entries` maps a column to log P."""
    height = max(z)
    weights = [mp.exp(x - height) for x in z]
    total = sum(weights)
    p, q = [mp.exp(x) for x in entries.values()], [weights[j] / total for j in entries]
    q_tail = sum((w for j, w in enumerate(weights) if j not in entries), mpf(0)) / total
    mass, q_mass = sum(p, mpf(0)), sum(q, mpf(0))
    if tail == "bucket":
        return [*p, mp.exp(log_tail)], [*q, q_tail]
    if mass <= NONE and tail != "drop":
        return [], []
    if tail == "renormalize":
        return [x / mass for x in p], [x / q_mass if q_mass else mpf(0) for x in q]
    if tail == "renormalize_teacher":
        return [*(x / mass for x in p), mpf(0)], [*q, q_tail]
    return p, q  # drop


def value_and_gradient(name, tail, parameter, temperature, logits, entries, log_tail):
    """D, its gradient with respect to logits / temperature (None where D is infinite), and the outcomes.

    Args:
        logits: floats, -inf allowed; entries: column -> log P, as floats.
    """
    with mpmath.workdps(DIGITS):
        z = [mpf(x) / mpf(temperature) if x != float("-inf") else -mp.inf for x in logits]
        entries = {j: mpf(x) for j, x in entries.items()}
        given = entries, mpf(log_tail) if log_tail != float("-inf") else -mp.inf, tail

        def at(j, step):
            moved = [x + step if i == j else x for i, x in enumerate(z)]
            return divergence_of(name, *outcomes(moved, *given), mpf(parameter))

        value, compared = at(-1, 0), outcomes(z, *given)
        if value == mp.inf:
            return value, None, compared
        return value, [(at(j, STEP) - at(j, -STEP)) / (2 * STEP) for j in range(len(z))], compared
