"""The loss section: what the student minimises, and how its numbers move over the run."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megakd.config.ramp import Ramp
from megakd.config.section import Count, NotNegative, Positive, Section
from megakd.divergences import DIVERGENCES, LEAST, PARAMETERS, TAILS


class Ramps(Section):
    """Numbers of the loss that move over the run; what is null stays what it is"""

    kd_weight: Ramp | None = None
    """Of kd_weight."""
    ce_weight: Ramp | None = None
    """Of ce_weight."""
    temperature: Ramp | None = None
    """Of temperature. A recorded teacher has the temperatures of its recording only, recorded hidden states all."""


class Loss(Section):
    """What the student minimises per supervised token: ce_weight * CE + kd_weight * temperature^2 * divergence"""

    divergence: Literal[tuple(DIVERGENCES)] = "forward_kl"
    """forward_kl = KL(teacher || student), reverse_kl = KL(student || teacher), jsd = beta KL(teacher || mix) +
    (1 - beta) KL(student || mix), and the skewed ones against a mixture with `skew` of the first model; alpha = (1 -
    sum teacher^alpha student^(1 - alpha)) / (alpha (1 - alpha)), between reverse (0) and forward (1) KL; tvd = half the
    sum of |teacher - student|, at most 1. In nats, but for the last two."""
    tail: Literal[TAILS] = "bucket"
    """What becomes of the mass outside the teacher's top_k: one more outcome (`bucket`), both sides rescaled to the
    top_k (`renormalize`), the teacher alone rescaled (`renormalize_teacher`), or no term for it (`drop`)."""
    beta: float = Field(PARAMETERS["beta"], ge=LEAST, lt=1)
    """Share of the teacher in the mixture of jsd, and of its own divergence in the sum (jsd only)."""
    skew: float = Field(PARAMETERS["skew"], ge=LEAST, lt=1)
    """Share of the first model in the mixture of the skewed divergences (those only)."""
    alpha: float = Field(PARAMETERS["alpha"], ge=LEAST, lt=1)
    """Weight of the teacher in the divergence alpha (that only): 1/2 treats both models alike."""
    targets: Literal["top_k", "whole", "sampled"] = "top_k"
    """What is compared per token: the teacher's top_k entries and its tail; its whole distribution, exactly, from its
    final hidden states, with both models' logits in blocks of tokens that are not kept; or draws from it, new ones in
    every step, whose loss and gradient are unbiased (forward_kl only; another parallel.tp makes others). The last two
    want a live teacher, or recorded hidden states."""
    draws: Count | None = None
    """Draws per token (targets sampled only, and needed there)."""
    top_k: Count = 64
    """Entries of the teacher's distribution kept per token; with targets whole, what a recorded step keeps of it."""
    temperature: Positive = 1.0
    """Divides both models' logits in the divergence; the divergence is multiplied by its square."""
    student_temperature: Positive | None = None
    """Divides the student's logits instead of `temperature`, and its square multiplies; null: the same for both."""
    kd_weight: NotNegative = 1.0
    """Weight of the divergence."""
    ce_weight: NotNegative = 0.0
    """Weight of the cross-entropy with the data's next token, at temperature 1."""
    logits_memory_budget_bytes: Count = 4 << 30
    """Most bytes of logits that a model may have at one time on a rank. A micro-batch that could have more has output
    layer and loss in blocks of tokens, whose gradients are formed at once and whose logits are not kept."""
    ramps: Ramps = Ramps()
    """kd_weight, ce_weight and temperature as functions of the step."""

    def problems(self) -> Iterator[tuple[str, str]]:
        row = DIVERGENCES[self.divergence]
        if self.tail not in row.tails:
            reason = row.refused.get(self.tail, f"{self.tail} has no meaning for {self.divergence}")
            yield "tail", f"{reason}; expected {' or '.join(sorted(row.tails))}"
        if self.targets != "top_k" and self.tail != "bucket":
            yield "tail", f"{self.tail}, but targets {self.targets} have no tail"
        if (self.draws is not None) != (self.targets == "sampled"):
            seen = "missing" if self.draws is None else self.draws
            yield "draws", f"{seen}, but targets is {self.targets}; sampled alone has it, and needs it"
        if self.targets == "sampled" and self.divergence != "forward_kl":
            yield "divergence", f"{self.divergence}, but draws give forward_kl only"
        for name, usual in PARAMETERS.items():
            if getattr(self, name) != usual and row.parameter != name:
                meant = "; how much the divergence weighs is kd_weight" if name == "alpha" else ""
                yield name, f"{getattr(self, name)}, but {self.divergence} has no such number{meant}"
        rises = any(ramp is not None and ramp.to > 0 for ramp in (self.ramps.kd_weight, self.ramps.ce_weight))
        if self.kd_weight == 0 and self.ce_weight == 0 and not rises:
            yield "kd_weight", "0, and ce_weight is 0 too: nothing is left to minimise"
        if self.ramps.temperature is not None and self.ramps.temperature.to == 0:
            yield "ramps.temperature.to", "0; expected a temperature above 0"
        if self.ramps.temperature is not None and self.student_temperature is not None:
            yield "ramps.temperature", "given with student_temperature; only one temperature of both models can move"

    def moved(self, step: int) -> dict[str, float]:
        """The values at an optimizer step (1 is the first) of the numbers that have a ramp."""
        ramps = {name: getattr(self.ramps, name) for name in Ramps.model_fields}
        return {name: ramp.value(getattr(self, name), step) for name, ramp in ramps.items() if ramp is not None}

    def at(self, step: int) -> "Loss":
        """The section with its numbers at an optimizer step; a pure function of it."""
        moved = self.moved(step)
        return self.model_copy(update=moved) if moved else self
