"""A model with weights."""

import torch

from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.torch_dist import load_weights
from megakd.config import Model, Parallel, Pipeline, Train
from megakd.models.gpt import GPT, build_gpt
from megakd.models.groups import WiderGroups
from megakd.models.sharding import shard
from megakd.models.wider import take_head


def build_model(
    model: Model,
    checkpoint: Checkpoint | None,
    parallel: Parallel,
    train: Train,
    groups,
    *,
    vocab_size: int,
    padded_size: int,
    device: torch.device,
    seed: int | None = None,
    name: str = "model",
    local: bool = False,
    pipeline: Pipeline = Pipeline(),  # noqa: B008  frozen
    sharded: bool = False,
    offload: bool = False,
    wider: WiderGroups | None = None,
) -> GPT:
    """This rank's part of a model, with the weights of a checkpoint, or random ones drawn from `seed`.

    Args:
        model: its section.
        vocab_size, padded_size: real ids that count in the loss; columns that are there, over all ranks.
        name: what the log calls it.
        local: as of `build_gpt`: for a model that generates, or is trained beside doing so.
        pipeline: the split of its layers over stages.
        sharded: cut over the ranks that see other tokens, for a model that only runs forward.
        offload: of a sharded one; its parts rest in host memory.
        wider: its groups where it is cut over several of the replicas that `groups` make.
    Raises:
        CheckpointError: the weights cannot be read.
    Collectives: those of loading.
    """
    its_groups = wider.groups if wider else groups
    gpt = build_gpt(
        model, parallel, train, its_groups,
        vocab_size=vocab_size, padded_size=padded_size, device=device, seed=None if checkpoint else seed,
        name=name, local=local, pipeline=pipeline,
    )  # fmt: skip
    if checkpoint:
        load_weights(gpt, checkpoint, its_groups)
    if wider:
        take_head(gpt, wider, groups)
    return shard(gpt, its_groups.dp_cp, trained=False, offload=offload) if sharded else gpt
