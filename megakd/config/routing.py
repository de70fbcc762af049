"""The routing section: what is asked of the routers of a student that trains."""

from collections.abc import Iterator

from megakd.config.model import Model
from megakd.config.section import NotNegative, Section


class Routing(Section):
    """How the routers of a student with experts are trained. Those of a teacher never change"""

    balance_weight: NotNegative = 0.0
    """Weight of the load balance in the objective: the scores of every token times how often its sequence
    chose each expert, relative to an even load, so 1 is even. Averaged over all positions, prompts and what fills up
    rows too; summed over layers."""
    z_loss_weight: NotNegative = 0.0
    """Weight of the squared log-sum-exp of the router's logits in the objective; averaged and summed likewise."""
    bias_update_rate: NotNegative = 0.001
    """What a step adds to or takes from the bias of an expert with less or more than the mean load (with moe.bias)."""

    @property
    def in_objective(self) -> bool:
        """Whether any term is."""
        return self.balance_weight > 0 or self.z_loss_weight > 0

    def model_problems(self, student: Model) -> Iterator[tuple[str, str]]:
        """Yields (dotted key, what is wrong) for what has no effect on this student."""
        moe = student.moe
        for key in ("balance_weight", "z_loss_weight"):
            if moe is None and getattr(self, key):
                yield f"routing.{key}", f"{getattr(self, key)}, but the student has no experts"
        if (moe is None or not moe.bias) and self.bias_update_rate != Routing().bias_update_rate:
            yield "routing.bias_update_rate", f"{self.bias_update_rate}, but the student has no moe.bias"
