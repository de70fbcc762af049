"""Megatron's TransformerConfig and layer specs for a model section."""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MLATransformerConfig, ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megakd.config import Model, Pipeline
from megakd.models.attention import Norm, NormOfKeys, NormOfQueries, SdpaAttention
from megakd.models.blocks import Layer, NormedRowParallelLinear, needs_own_layers
from megakd.models.moe import mend, mla_fields, moe_fields

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "squared_relu": squared_relu,
}


def transformer_config(
    model: Model, parallel, train, transformer_engine: bool, pipeline: Pipeline
) -> TransformerConfig:
    """Megatron's TransformerConfig for a model section; one place, so that student and teacher cannot differ in it.

    Between virtual stages messages go one by one: in batches, Megatron's way without, they are taken in the order in
    which they come, and with two stages both neighbours are one rank, so that some are taken for others.

    The result has the section itself as `config.model`, for the modules of megakd.models.
    """
    mend()
    layers = range(model.num_layers)
    fields = {"qk_layernorm": model.qk_norm} if model.mla is None else mla_fields(model)
    config = (TransformerConfig if model.mla is None else MLATransformerConfig)(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.norm_zero_centered,
        gated_linear_unit=model.gated,
        activation_func=ACTIVATIONS[model.activation],
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        softmax_scale=model.softmax_scale,
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),
        window_attn_skip_freq=[int(model.has_window(i)) for i in layers] if model.sliding_window else None,
        no_rope_freq=[int(i in model.no_rope_layers) for i in layers] if model.no_rope_layers else None,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_std,
        init_method=leave,  # initialization.py draws, the same for every layout; perform_initialization=False would
        output_layer_init_method=leave,  # also leave out the attributes that gradient norms and slicing go by
        embedding_init_method=leave,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        num_layers_in_first_pipeline_stage=pipeline.first_stage_layers,
        num_layers_in_last_pipeline_stage=pipeline.last_stage_layers,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sp,
        params_dtype=DTYPES[train.precision],
        pipeline_dtype=DTYPES[train.precision],
        bf16=train.precision == "bf16",
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=transformer_engine,
        cuda_graph_scope=[],
        recompute_granularity=None if train.recompute == "none" else train.recompute,
        recompute_method="uniform" if train.recompute == "full" else None,
        recompute_num_layers=1 if train.recompute == "full" else None,
        **fields,
        **moe_fields(model, parallel, transformer_engine),
    )
    config.model = model
    return config


def leave(weight: Tensor) -> Tensor:
    return weight


def layer_specs(
    config: TransformerConfig, transformer_engine: bool, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (of this virtual one, where there are some), and the final norm."""
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    layers = [
        layer_spec(config, first + i, transformer_engine)
        for i in range(get_num_layers_to_build(config, vp_stage, pp_rank))
    ]
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)


def layer_spec(config: TransformerConfig, number: int, transformer_engine: bool) -> ModuleSpec:
    """One layer, counted from 0."""
    model: Model = config.model
    experts = model.moe.num_experts if model.has_experts(number) else None
    kinds = {
        "num_experts": experts,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": model.mla is not None,
    }
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(**kinds)
    spec = get_gpt_layer_local_spec(normalization=config.normalization, **kinds)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = Norm if model.pre_norms else IdentityOp
    layer.pre_mlp_layernorm = Norm if model.pre_norms and not model.shared_norm else IdentityOp
    attention.core_attention = SdpaAttention
    if model.mla is not None:
        attention.q_layernorm = Norm if model.mla.q_lora_rank else IdentityOp
        attention.kv_layernorm = Norm
    elif model.qk_norm_over == "all_heads":
        attention.q_layernorm, attention.k_layernorm = NormOfQueries, NormOfKeys
    else:
        attention.q_layernorm = attention.k_layernorm = Norm if model.qk_norm else IdentityOp
    if model.post_norms:
        attention.linear_proj = NormedRowParallelLinear
        parts_of(layer.mlp).linear_fc2 = NormedRowParallelLinear
    layer.sharded_state_dict_keys_map = saved_names(model, experts is not None)
    if needs_own_layers(model):
        spec = dataclasses.replace(spec, module=Layer)
    return spec


def parts_of(spec):
    """What a layer is described by: in a ModuleSpec, or, from Megatron-Core 0.19 on, in a partial of the class."""
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def saved_names(model: Model, has_experts: bool) -> dict[str, str]:
    """Local names -> the names that Transformer Engine layers save under, so that a checkpoint is the same for both."""
    names = {}
    if model.mla is None:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    else:
        names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    if not has_experts:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names
