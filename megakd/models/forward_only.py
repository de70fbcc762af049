"""Run micro-batches through a model's pipeline without gradients; keep what a function makes of each output."""

import functools
from collections.abc import Callable

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megakd.models.micro_batch import MicroBatch, forward
from megakd.models.sharding import let_go


def schedule(gpt, groups) -> Callable:
    """Megatron's schedule for a model's stages."""
    return get_forward_backward_func(groups.pp.size(), len(gpt.chunks) if len(gpt.chunks) > 1 else None)


def streams(gpt, items: list):
    """The micro-batches as the schedule takes them: one iterator, or one for each virtual stage."""
    return iter(items) if len(gpt.chunks) == 1 else [iter(items) for _ in gpt.chunks]


def pipeline(gpt, groups) -> dict:
    """The groups, as Megatron's schedules want them: several stages need a communicator beside them."""
    if groups.pp.size() == 1:
        return {"pg_collection": groups}
    return {"pg_collection": groups, "p2p_communicator": P2PCommunicator(groups.pp, gpt.config)}


@torch.no_grad()
def forward_only(gpt, micro_batches: list[MicroBatch], keep: Callable[[Tensor, MicroBatch], object], groups) -> list:
    """Megatron's own schedule, forward only.

    Args:
        gpt: a model; is put into eval mode for the call and back.
        keep: makes the value to keep from (hidden_SBH, micro_batch); runs on the last stage, at once, so that
            neither logits nor hidden states of other micro-batches stay in memory.
    Returns:
        the kept values in order on the last pipeline stage, an empty list on the others.
    """

    def step(iterator, model):
        micro_batch = next(iterator)
        return forward(model, micro_batch), functools.partial(kept, micro_batch)

    def kept(micro_batch, hidden_SBH, non_loss_data):
        return keep(hidden_SBH, micro_batch)

    training = gpt.training
    if training:  # a walk through all modules, which a model that generates need not do for every token
        for chunk in gpt.chunks:
            chunk.eval()
    try:
        return schedule(gpt, groups)(
            forward_step_func=step,
            data_iterator=streams(gpt, micro_batches),
            model=gpt.chunks,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].ids_BS.shape[1],
            micro_batch_size=micro_batches[0].ids_BS.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
            **pipeline(gpt, groups),
        )
    finally:
        let_go(gpt)
        if training:
            for chunk in gpt.chunks:
                chunk.train()
