"""A model's weights cut over the ranks that see other tokens: torch's FSDP2, which gathers a layer where it runs.

Every layer is a unit: gathered before it runs, let go afterwards, and in the backward pass once more. The rest
(embedding, last norm, head) is one unit: the loss runs the head after the model's forward, and may use the embedding
for it, so these stay whole from the first forward until the backward pass ends, or `let_go`.

Megatron's own wrapper of FSDP2 shards the head as a unit whose forward, here, never runs, and reduces gradients in
the type of the weights. What a student may be sharded by instead, Megatron-FSDP, is in megakd.training.megatron_fsdp;
what is asked of a sharded model is asked here, whichever it is.
"""

import inspect
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megakd.models.gpt import GPT


def shard(gpt: GPT, group: dist.ProcessGroup, *, trained: bool, offload: bool = False) -> GPT:
    """Cut the weights of a model along their first axis, in place; returns it.

    Args:
        gpt: with weights, the same on all ranks of the group; one pipeline stage that is not interleaved.
        group: the ranks.
        trained: what is kept is float32, whatever type it computes in, so that an optimizer can step on it; gradients
            are averaged over the group in float32, with every micro-batch.
        offload: the parts rest in host memory, and a unit's are copied to the device before they are gathered.
    Collectives: a forward all-gathers the weights, a backward those of the layers once more and reduce-scatters their
        gradients (4 bytes a parameter).
    """
    device = next(gpt.parameters()).device.type
    mesh = DeviceMesh.from_group(group, device)
    rest = CPUOffloadPolicy(pin_memory=device == "cuda") if offload else OffloadPolicy()
    kind = gpt.config.params_dtype
    policy = MixedPrecisionPolicy(
        param_dtype=kind if trained and kind != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the angles of rotary embeddings are float32
    )
    previous = None
    for module in [*gpt.decoder.layers, gpt]:
        attributes = {name: vars(parameter) for name, parameter in module.named_parameters()}
        if trained:
            module.float()  # one layer after the other: both copies of all would be larger than either
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=rest, reshard_after_forward=module is not gpt)
        for name, parameter in module.named_parameters():  # Megatron's: how it is cut over tp, what is summed
            vars(parameter).update(attributes[name])
        if trained and previous is not None and gpt.config.recompute_granularity is not None and module is not gpt:
            module.set_modules_to_backward_prefetch([previous])  # recomputing would upset the order that is recorded
        previous = module
    return gpt


def is_sharded(gpt: nn.Module) -> bool:
    return isinstance(gpt, FSDPModule) or hasattr(gpt, "sharded_by")


def let_go(gpt: GPT) -> None:
    """Keep this rank's part alone of what a forward has left whole; whoever looks at the weights looks at parts."""
    if isinstance(gpt, FSDPModule):
        gpt.reshard()
    elif is_sharded(gpt):
        end_gathers(gpt.sharded_by)
        gpt.sharded_by.synchronize_param_gather()


def end_gathers(megatron_fsdp: nn.Module) -> None:
    """Let go of what Megatron-FSDP has gathered, and wait for what it gathers ahead.

    Where it lets go itself it waits too, with a warning, and since 0.17 keeps what is outside of the layers.
    """
    pipeline = megatron_fsdp.all_gather_pipeline
    while pipeline.param_gather_event_map:
        pipeline.wait_bucket_ready(*next(iter(pipeline.param_gather_event_map)))
    if "preserve_non_fsdp_units" in inspect.signature(pipeline.reset).parameters:
        pipeline.reset(preserve_non_fsdp_units=False)


def gather_head(gpt: GPT) -> None:
    """Make embedding, last norm and head of a teacher whole, outside of a forward, until `let_go`.

    Collectives: an all-gather of their weights.
    """
    if is_sharded(gpt):
        gpt.unshard()


def own(tensor: Tensor) -> Tensor:
    """This rank's part of what is sharded; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: DTensor) -> torch.Size:
    """Of a sharded parameter, without FSDP; Megatron-FSDP takes in what tensor parallelism cuts as well."""
    return tensor.orig_param.shape if hasattr(tensor, "orig_param") else tensor.shape


def own_rows(tensor: DTensor) -> range:
    """Which rows of the whole this rank's part is."""
    shape, part = whole_shape(tensor), len(tensor.to_local())
    if hasattr(tensor, "megatron_fsdp_slice"):  # in elements
        first = tensor.megatron_fsdp_slice.start // math.prod(shape[1:])
        return range(first, first + part)
    mesh = tensor.device_mesh
    size = -(-shape[0] // mesh.size())
    first = min(mesh.get_coordinate()[0] * size, shape[0])
    found = range(first, min(first + size, shape[0]))
    assert len(found) == part, f"{found} of {list(shape)}, but {part} rows"
    return found
