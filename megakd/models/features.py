"""Feature distillation: distances between hidden states of student and teacher layers, added inside the layers.

A loss computed from collected hidden states silently loses its gradient when activations are recomputed. So the
distance is attached where the hidden state is made: the layer's output passes through an autograd function that adds
the distance's gradient on its way back, with any recomputation and on any pipeline stage.

Legend: S sequence (of this rank under sequence parallelism), B samples, H hidden, T supervised tokens of this rank.
"""

from collections import deque

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megakd.config import Features
from megakd.kernels.vocab import MASKED
from megakd.models.gpt import GPT
from megakd.models.initialization import draw
from megakd.models.micro_batch import MicroBatch


class AddLoss(torch.autograd.Function):
    """The identity on x, which also sends gradient 1 to a scalar loss."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=torch.float32)


class FeatureLoss:
    """Attaches the distances to a student's layers and collects what the teacher's layers say.

    Where the widths differ the student has a learned linear map in front, `feature_maps.N` in its checkpoints: it is
    replicated over tensor parallel ranks, and drawn from the seed by name.

    Args:
        student, teacher: this rank's parts; call before the student is wrapped for data parallelism.
        section: the config's.
        seed: of the maps.
    """

    def __init__(self, student: GPT, teacher: GPT, section: Features, seed: int):
        self.section, self.tp = section, student.pg_collection.tp
        self.sequence_parallel = student.config.sequence_parallel
        self.groups = student.pg_collection
        self.collecting = False
        self.masks: list[Tensor] = []
        self.seen: dict[int, deque[Tensor]] = {}
        self.turn: dict[int, int] = {}
        self.total = torch.zeros((), dtype=torch.float64, device=next(student.parameters()).device)
        student.feature_maps = torch.nn.ModuleDict()
        teacher_layers = {layer.layer_number: layer for layer in teacher.decoder.layers}
        pairs = dict(zip(section.student_layers, section.teacher_layers, strict=True))
        for layer in student.decoder.layers:
            number = layer.layer_number
            if number in pairs:
                if student.config.hidden_size != teacher.config.hidden_size:
                    student.feature_maps[str(number)] = build_map(student, teacher.config.hidden_size, number, seed)
                teacher_layers[pairs[number]].register_forward_hook(self.teacher_hook(number))
                layer.register_forward_hook(self.student_hook(number, student.feature_maps))

    def teacher_hook(self, number: int):
        def keep(module, arguments, output):
            if self.collecting:
                self.seen.setdefault(number, deque()).append(output[0])

        return keep

    def student_hook(self, number: int, maps: torch.nn.ModuleDict):
        def attach(module, arguments, output):
            if not torch.is_grad_enabled() or not module.training:  # the first pass of a recomputed layer; validation
                return output
            hidden_SBH, *rest = output
            mask_SB = self.masks[self.turn.get(number, 0)]  # micro-batches come and are recomputed in order
            self.turn[number] = self.turn.get(number, 0) + 1
            mapped = maps[str(number)](hidden_SBH) if str(number) in maps else hidden_SBH
            loss = self.section.weight * distance(mapped, self.seen[number].popleft(), mask_SB, self.section.distance)
            self.total += loss.detach().double()
            return (AddLoss.apply(hidden_SBH, loss), *rest)

        return attach

    def begin(self, micro_batches: list[MicroBatch]) -> None:
        """Before the teacher's pass of a step: forget the last one, and keep its hidden states from here on."""
        self.masks = [
            self.own_part(micro_batch.own(micro_batch.labels_BS).T != MASKED) for micro_batch in micro_batches
        ]
        self.seen, self.turn, self.collecting = {}, {}, True
        self.total.zero_()

    def end_teacher(self) -> None:
        """After the teacher's pass."""
        self.collecting = False

    def sum(self) -> float:
        """The weighted distances of the step, summed over the global batch's supervised tokens.

        Collectives: all-reduces of one number over dp, pp, and with sequence parallelism tp.
        """
        total = self.total.clone()
        for group in (self.groups.dp_cp, self.groups.pp, *([self.tp] if self.sequence_parallel else [])):
            dist.all_reduce(total, group=group)
        return float(total)

    def own_part(self, mask_SB: Tensor) -> Tensor:
        """The rows of the sequence that this rank's layers hold."""
        return mask_SB.chunk(self.tp.size())[self.tp.rank()] if self.sequence_parallel else mask_SB


def build_map(student: GPT, teacher_hidden: int, number: int, seed: int) -> torch.nn.Linear:
    width, like = student.config.hidden_size, next(student.parameters())
    linear = torch.nn.Linear(width, teacher_hidden, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        std = width**-0.5
        linear.weight.copy_(draw(linear.weight.shape, std, seed, f"feature_maps.{number}.weight"))
    linear.weight.sequence_parallel = student.config.sequence_parallel
    return linear


def distance(student_SBH: Tensor, teacher_SBH: Tensor, mask_SB: Tensor, kind: str) -> Tensor:
    """Sum over the supervised tokens; float32."""
    student_TH, teacher_TH = student_SBH[mask_SB].float(), teacher_SBH[mask_SB].float()
    if kind == "mse":
        return (student_TH - teacher_TH).square().mean(-1).sum()
    return (1 - F.cosine_similarity(student_TH, teacher_TH, dim=-1)).sum()
