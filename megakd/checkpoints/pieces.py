"""Sharded weights in Megatron's checkpoints: every rank's rows as pieces of the tensor that tensor parallelism cuts.

Megatron describes a rank's tensor as a box on a regular grid, or, where the file has two tensors for it (a gated
layer's two matrices), as a factory of boxes. Of such a box a rank of FSDP has some rows. A piece is a box that lies
on no grid, under the same name: written so, a checkpoint is read at any layout, and the reverse. Megatron's own
description of what FSDP2 shards knows even shards alone, and of gated layers (in 0.16) none.
"""

import dataclasses

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from megakd.models.sharding import own_rows, whole_shape


def describe_whole(gpt, metadata: dict) -> tuple[dict, dict[str, DTensor]]:
    """Megatron's description of a model as if nothing of it were sharded, and the sharded parameters by name in it.

    For the time of this call, tensors without content stand in for them.
    """
    sharded: dict[int, DTensor] = {}
    places = []
    for module in gpt.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                places.append((module, name, parameter))
    assert places, "nothing is sharded, or it is whole for a forward"
    try:
        for module, name, parameter in places:
            empty = torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
            stand_in = module._parameters[name] = Parameter(empty, requires_grad=False)
            vars(stand_in).update(vars(parameter))
            sharded[id(stand_in)] = parameter
        weights = gpt.sharded_state_dict(metadata=metadata)
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
    described = {name: id(getattr(base, "data", None)) for name, base in weights.items()}
    found = {name: sharded[stand_in] for name, stand_in in described.items() if stand_in in sharded}
    assert len(found) == len(sharded), "a parameter is not described"
    return weights, found


def describe_pieces(gpt, metadata: dict, dtype: torch.dtype | None) -> dict:
    """A sharded model's description: this rank's pieces, and what is not sharded.

    Args:
        dtype: of what is written; None: as it is kept. The pieces then are the weights themselves, so that what is read
            into them is in place.
    """
    weights, sharded = describe_whole(gpt, metadata)
    described = {}
    for name, base in weights.items():
        if name in sharded:
            local = sharded[name].detach().to_local()
            described |= pieces(name, base, sharded[name], local if dtype is None else local.to(dtype))
        else:
            described[name] = base
    return described


def pieces(
    name: str, base: ShardedTensor | ShardedTensorFactory, whole: DTensor, local: Tensor, key: str | None = None
) -> dict[str, ShardedTensor]:
    """This rank's rows of one tensor.

    Args:
        name: what the pieces are called in the result, with a number.
        base: the description of the whole.
        whole: the sharded parameter.
        local: the rows, of the parameter or of an optimizer's state for it.
        key: name in the checkpoint; None: the parameter's own.
    """
    rows, empty = own_rows(whole), torch.empty(whole_shape(whole), dtype=local.dtype, device="meta")
    if isinstance(base, ShardedTensorFactory):
        boxes = dataclasses.replace(base, key=key or base.key, data=empty).build()
    else:
        boxes = [dataclasses.replace(base, key=key or base.key, data=empty, dtype=empty.dtype)]
    found, first = {}, 0
    for number, box in enumerate(boxes):
        start, stop = max(rows.start, first), min(rows.stop, first + box.local_shape[0])
        if start < stop:
            found[f"{name}.{number}"] = narrow(box, start - first, local[start - rows.start : stop - rows.start])
        first += box.local_shape[0]
    return found


def narrow(box: ShardedTensor, start: int, part: Tensor) -> ShardedTensor:
    """The rows of a box from `start` on, which no other rank of its data-parallel group has."""
    offset = list(box.global_offset)
    offset[box.prepend_axis_num] += start
    part = part[(None,) * box.prepend_axis_num]  # Megatron forgets those axes where there is no grid
    return dataclasses.replace(
        box,
        data=part,
        local_shape=tuple(part.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=(*box.replica_id[:-1], 0),
    )


def is_piece(part) -> bool:
    return isinstance(part, ShardedTensor) and part.axis_fragmentations is None
