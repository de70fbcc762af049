"""The divergences that a student can be trained on, by name; no torch, for config and `--help` read it too.

The kernels' mathematics of each is in kernels/divergences.py, its definition in kernels/kd_loss_reference.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

TAILS = ("bucket", "renormalize", "renormalize_teacher", "drop")
PARAMETERS = {"beta": 0.5, "skew": 0.1, "alpha": 0.5}  # a number of some divergences, and what it is unless given
LEAST = 1e-30  # of a parameter: its logarithm, and that of 1 minus it, must exist in float32


class Divergence(NamedTuple):
    """One divergence of the teacher p and the student q.

    Attributes:
        meaning: its formula, for people.
        tails: what may become of the mass outside the teacher's entries, the usual choice first.
        parameter: the name of its number between 0 and 1, exclusive, if it has one.
        refused: why it does not go with some tails.
    """

    meaning: str
    tails: tuple[str, ...]
    parameter: str | None = None
    refused: Mapping[str, str] = {}

    def check_parameter(self, parameters: Mapping[str, float]) -> float:
        """Its parameter among the given ones, or the usual one; 0.5 where it has none.

        Raises:
            ValueError: it is out of range, or one of the given ones is no divergence's.
        """
        if strange := parameters.keys() - PARAMETERS.keys():
            raise ValueError(f"no divergence has a parameter {sorted(strange)[0]!r}; there are {', '.join(PARAMETERS)}")
        if self.parameter is None:
            return 0.5
        value = float(parameters.get(self.parameter, PARAMETERS[self.parameter]))
        if not LEAST <= value < 1:
            raise ValueError(f"{self.parameter} must be between 0 and 1, exclusive (and at least {LEAST}), not {value}")
        return value


DIVERGENCES = {
    "forward_kl": Divergence("KL(p || q)", ("bucket", "renormalize", "renormalize_teacher", "drop")),
    "reverse_kl": Divergence(
        "KL(q || p)",
        ("bucket", "renormalize"),
        refused={
            "renormalize_teacher": "renormalize_teacher makes reverse_kl infinite",
            "drop": "drop lets reverse_kl fall by moving mass out of the top_k",
        },
    ),
    "jsd": Divergence(
        "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
        ("bucket", "renormalize", "renormalize_teacher"),
        parameter="beta",
    ),
    "skew_forward_kl": Divergence("KL(p || skew p + (1 - skew) q)", ("bucket", "renormalize"), parameter="skew"),
    "skew_reverse_kl": Divergence(
        "KL(q || skew q + (1 - skew) p)", ("bucket", "renormalize", "renormalize_teacher"), parameter="skew"
    ),
    "alpha": Divergence(
        "(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha))",
        ("bucket", "renormalize", "renormalize_teacher"),
        parameter="alpha",
    ),
    "tvd": Divergence("sum |p - q| / 2", ("bucket", "renormalize", "renormalize_teacher")),
}


def find(divergence: str, tail: str = "bucket") -> Divergence:
    """Raises ValueError for an unknown divergence, and for a tail that it does not go with."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    row = DIVERGENCES[divergence]
    if tail not in row.tails:
        raise ValueError(f"tail must be one of {', '.join(row.tails)} with {divergence}, not {tail!r}")
    return row
