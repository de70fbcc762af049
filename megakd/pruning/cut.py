"""A student's weights out of a checkpoint's, tensor by tensor: which axis of which of them is cut by what.

Names are those of `megakd.converters.rules`. A tensor that is not in the table is an error, never a copy.

Legend: N query heads, G query groups, D channels of a head.
"""

import pathlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megakd.checkpoints.folder import Checkpoint
from megakd.checkpoints.layout import EXPERT, LAYER, OPT_UNUSED_POSITIONS, expected_shape, extra_states, names_in, place
from megakd.checkpoints.torch_dist_files import TorchDistWriter
from megakd.config import Model
from megakd.converters.huggingface.exporting import MegatronWeights
from megakd.converters.huggingface.importing import EXTRA, bytes_bar
from megakd.digests import FileDigests
from megakd.errors import CheckpointError
from megakd.pruning.choose import Kept
from megakd.pruning.sizes import sizes_of

# Kinds of axes: never cut; the residual stream; the channels of all query heads; the rows of all groups' queries, keys
# and values; a block's inner channels; those of its first layer, gate and up in a row where it is gated; experts.
WHOLE, HIDDEN, HEADS, QKV, INNER, FIRST, EXPERTS = "whole", "hidden", "heads", "qkv", "inner", "first", "experts"
BLOCKS = {  # where a feed-forward block's layers are -> the key of the prune section that cuts its inner channels
    "mlp.": "ffn_hidden_size",
    "mlp.experts.": "expert_ffn_hidden_size",
    "mlp.shared_experts.": "shared_ffn_hidden_size",
}
LINEARS = {
    "embedding.word_embeddings": (WHOLE, HIDDEN),
    "embedding.position_embeddings": (WHOLE, HIDDEN),
    "output_layer": (WHOLE, HIDDEN),
    "self_attention.linear_qkv": (QKV, HIDDEN),
    "self_attention.linear_proj": (HIDDEN, HEADS),
    "self_attention.linear_q_proj": (WHOLE, HIDDEN),
    "self_attention.linear_q_down_proj": (WHOLE, HIDDEN),
    "self_attention.linear_q_up_proj": (WHOLE, WHOLE),
    "self_attention.linear_kv_down_proj": (WHOLE, HIDDEN),
    "self_attention.linear_kv_up_proj": (WHOLE, WHOLE),
    "mlp.router": (EXPERTS, HIDDEN),
    **{f"{block}linear_fc1": (FIRST, HIDDEN) for block in BLOCKS},
    **{f"{block}linear_fc2": (HIDDEN, INNER) for block in BLOCKS},
}
NORMS = {
    "decoder.final_layernorm.": HIDDEN,
    "input_layernorm.": HIDDEN,
    "pre_mlp_layernorm.": HIDDEN,
    "self_attention.linear_qkv.layer_norm_": HIDDEN,
    "self_attention.linear_proj.post_layernorm.": HIDDEN,
    "mlp.linear_fc1.layer_norm_": HIDDEN,
    "mlp.linear_fc2.post_layernorm.": HIDDEN,
    "self_attention.q_layernorm.": WHOLE,
    "self_attention.k_layernorm.": WHOLE,
    "self_attention.linear_q_up_proj.layer_norm_": WHOLE,
    "self_attention.linear_kv_up_proj.layer_norm_": WHOLE,
}
AXES = {
    **{f"{module}.weight": axes for module, axes in LINEARS.items()},
    **{f"{module}.bias": axes[:1] for module, axes in LINEARS.items()},
    **{f"{norm}{kind}": (axis,) for norm, axis in NORMS.items() for kind in ("weight", "bias")},
    "mlp.router.expert_bias": (EXPERTS,),
    "mlp.shared_experts.gate_weight": (WHOLE, HIDDEN),
    OPT_UNUSED_POSITIONS: (WHOLE, HIDDEN),
}
LEFT_BEHIND = ("optimizer.", "feature_maps.", EXTRA)  # of training; constants of the Hugging Face files


def cut(
    checkpoint: Checkpoint, target: pathlib.Path, student: Model, kept: Kept, *, progress: bool = False
) -> dict[str, FileDigests]:
    """Write the student's weights as a torch_dist folder; one tensor is in memory at a time.

    Args:
        checkpoint: of the model that is cut.
        target: an empty folder.
        student: the section that `kept` leaves of the model's.
    Returns:
        digests of the data files by name.
    Raises:
        CheckpointError: a tensor is not known, or cannot be read.
    """
    weights, model = MegatronWeights(checkpoint), checkpoint.model
    pairs = list(renamed(known_names(weights), kept))
    total = sum(shape.numel() * dtype.itemsize for shape, dtype in (weights.spec(name) for name, _ in pairs))
    with TorchDistWriter(target) as writer, bytes_bar(total, "cut", progress) as bar:
        for name, new in pairs:
            whole = weights.load(name)
            part = cut_tensor(whole, name, model, kept)
            wanted = expected_shape(new, student)
            assert wanted == tuple(part.shape), f"{new} is {list(part.shape)}, the student's section makes it {wanted}"
            writer.write(place(new, student), part)
            bar.update(whole.nbytes)
        for state in extra_states(student):
            writer.write_object(state, [None])
        writer.finish({})
    return writer.written


def known_names(weights: MegatronWeights) -> list[str]:
    """Of the tensors that a checkpoint's model consists of.

    Raises:
        CheckpointError: one is not in the table.
    """
    keys = [key for key in weights.reader.tensors if not key.startswith(LEFT_BEHIND)]
    names = [name for key in keys for name in names_in(key, weights.model)]
    if unknown := sorted({name for name in names if in_table(name) not in AXES}):
        raise CheckpointError(
            f"{weights.reader.folder} holds tensors of which it is not known how they are cut: "
            f"{', '.join(unknown[:10])}",
            hint="models with these cannot be pruned; nothing was written",
        )
    return names


def renamed(names: list[str], kept: Kept) -> Iterator[tuple[str, str]]:
    """Names in the model and in the student, of every tensor that the student has."""
    new_layers = {layer: number for number, layer in enumerate(kept.layers)}
    for name in names:
        new, (layer, expert) = name, numbers(name)
        if layer is not None:
            if layer not in new_layers:
                continue
            new = LAYER.sub(f"decoder.layers.{new_layers[layer]}.", new)
        if expert is not None and (left := kept.of("num_experts", layer)) is not None:
            if expert not in (experts := left.tolist()):
                continue
            new = EXPERT.sub(f".experts.{experts.index(expert)}.", new)
        yield name, new


def in_table(name: str) -> str:
    """A tensor's name without numbers of layer and expert."""
    return EXPERT.sub(".experts.", LAYER.sub("", name))


def numbers(name: str) -> tuple[int | None, int | None]:
    """Of layer and expert."""
    found = (LAYER.match(name), EXPERT.search(name))
    return tuple(None if match is None else int(match[1]) for match in found)


def cut_tensor(tensor: Tensor, name: str, model: Model, kept: Kept) -> Tensor:
    """What is left of a tensor of the model."""
    for axis, kind in enumerate(AXES[in_table(name)]):
        ids = places(kind, name, model, kept)
        if ids is not None:
            tensor = tensor.index_select(axis, ids)
    return tensor


def places(kind: str, name: str, model: Model, kept: Kept) -> Tensor | None:
    """Which rows (or columns) of an axis are left; None: all."""
    layer, expert = numbers(name)
    if kind == WHOLE:
        return None
    if kind == HIDDEN:
        return kept.of("hidden_size")
    if kind == EXPERTS:
        return kept.of("num_experts", layer)
    if kind in (HEADS, QKV):
        groups = kept.of("num_query_groups", layer)
        if groups is None:
            return None
        heads = model.num_attention_heads // sizes_of(model)["num_query_groups"]
        return spans(groups, (heads if kind == HEADS else heads + 2) * model.head_channels)
    key = BLOCKS[in_table(name).rpartition("linear_fc")[0]]
    inner = kept.of(key, layer) if expert is None else kept.of(key, layer, expert)
    if inner is None or kind == INNER or not model.gated:
        return inner
    return torch.cat([inner, inner + sizes_of(model)[key]])


def spans(groups: Tensor, size: int) -> Tensor:
    """The places of groups of `size` neighbours."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
