"""Initial weights that do not depend on the layout: each full weight is drawn on CPU by name, then sliced.

A run on another number of tensor- or pipeline-parallel ranks therefore starts from the same model, and two runs
that differ in layout can be compared from step 0.
"""

import hashlib
import math
import re

import torch
from torch import Tensor

EXPERT = ".experts.local_experts."  # before an expert's number on its rank


@torch.no_grad()
def initialize_weights(model, seed: int) -> None:
    """Draw all weights of a GPTModel, as Megatron's defaults do: normal(0, init_std), the projections that end a
    residual branch normal(0, init_std / sqrt(2 * num_layers)), norm gains 1, biases 0.

    Args:
        model: GPTModel; its parameters are overwritten.
        seed: of this model's weights; with the parameter's global name it determines every value.
    """
    groups, config = model.pg_collection, model.config
    for name, parameter in model.named_parameters():
        name = global_name(model, name)
        if parameter.dim() < 2:
            gain = 0.0 if config.layernorm_zero_centered_gamma else 1.0
            parameter.fill_(gain if "norm" in name and name.endswith("weight") else 0.0)
            continue
        std = config.init_method_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * config.num_layers)
        tp = groups.expt_tp if EXPERT in name else groups.tp
        parameter.copy_(own_slice(draw(full_shape(parameter, tp.size()), std, seed, name), parameter, tp))


def global_name(model, name: str) -> str:
    """The parameter's name with the numbers of layer and expert in the whole model; a tied head goes by its embedding's
    name."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if not layer:
        return name
    number, rest = model.decoder.layers[int(layer[1])].layer_number - 1, name[layer.end() :]
    if EXPERT in rest:
        before, after = rest.split(EXPERT)
        own, _, weight = after.partition(".")
        first = model.pg_collection.ep.rank() * (model.config.num_moe_experts // model.pg_collection.ep.size())
        rest = f"{before}{EXPERT}{first + int(own)}.{weight}"
    return f"decoder.layers.{number}.{rest}"


def shared_name(model, name: str) -> str:
    """As global_name, and the same whichever of Megatron's layers a model is built of.

    Transformer Engine has a norm in the projection that follows it; that name is the one in checkpoints, too.
    """
    name = global_name(model, name)
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer:
        here = next(one for one in model.decoder.layers if one.layer_number - 1 == int(layer[1]))
        for own, shared in here.submodules_config.sharded_state_dict_keys_map.items():
            if name.startswith(own, layer.end()):
                return name[: layer.end()] + shared + name[layer.end() + len(own) :]
    return name


def draw(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) * std


def is_split(parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def full_shape(parameter, ranks: int) -> torch.Size:
    shape = list(parameter.shape)
    if is_split(parameter):
        shape[parameter.partition_dim] *= ranks
    return torch.Size(shape)


def own_slice(full: Tensor, parameter, tp) -> Tensor:
    """This rank's part; a gated MLP's first weight is two matrices, each split over the ranks (partition_stride 2)."""
    if not is_split(parameter):
        return full
    parts = full.chunk(parameter.partition_stride, parameter.partition_dim)
    return torch.cat(
        [part.chunk(tp.size(), parameter.partition_dim)[tp.rank()] for part in parts], parameter.partition_dim
    )
