"""The features section: hidden states of chosen layers that the student learns to reproduce."""

from collections.abc import Iterator
from typing import Literal

from megakd.config.section import Count, NotNegative, Section


class Features(Section):
    """Hidden states the student learns to reproduce: weight * distance, summed over the pairs, per supervised token"""

    student_layers: list[Count]
    """Student layers whose outputs are compared, counted from 1."""
    teacher_layers: list[Count]
    """Teacher layers they are compared with, one for each."""
    distance: Literal["mse", "cosine"] = "mse"
    """mse: mean over channels of the squared difference; cosine: 1 - cosine of the angle."""
    weight: NotNegative = 1.0
    """Factor of the distances; never rescaled to that of another loss."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(self.student_layers) != len(self.teacher_layers) or not self.student_layers:
            seen = f"{len(self.teacher_layers)} layers for {len(self.student_layers)} of the student"
            yield "teacher_layers", f"{seen}; expected one for each, and at least one"
        if len(set(self.student_layers)) < len(self.student_layers):
            yield "student_layers", f"{self.student_layers} names a layer twice; expected different layers"

    def layer_problems(self, student_stages: list[int], teacher_stages: list[int]) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong) for layers that do not exist, or are on another pipeline stage than their pair.

        Args:
            student_stages, teacher_stages: the pipeline stage of every layer of each model.
        """
        for key, layers, most in (
            ("student_layers", self.student_layers, len(student_stages)),
            ("teacher_layers", self.teacher_layers, len(teacher_stages)),
        ):
            if max(layers) > most:
                yield f"features.{key}", f"{max(layers)}, but that model has {most} layers"
                return
        for student, teacher in zip(self.student_layers, self.teacher_layers, strict=True):
            stages = student_stages[student - 1], teacher_stages[teacher - 1]
            if stages[0] != stages[1]:
                where = (
                    f"student layer {student} is on pipeline stage {stages[0]}, teacher layer {teacher} on {stages[1]}"
                )
                yield "features.teacher_layers", f"{where}; expected pairs of one stage"
