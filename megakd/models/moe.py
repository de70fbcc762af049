"""Experts and latent attention: the fields of Megatron's config for them, and five upstream bugs mended.

1. megatron-core 0.16.1, no Transformer Engine: every router's forward raises NameError (te_general_gemm).
2. The same: latent attention compares its layers with a mock of TELinear and raises TypeError.
3. The same, with tensor parallelism: the rotated channels of the keys, which all heads share, get the gradient of one
   rank's heads only.
4. megatron-core 0.19: latent attention whose queries have no rank of their own (DeepSeek-V2-Lite) normalises its hidden
   states once more before the queries, with Transformer Engine, and raises without.
5. 0.16.1 and 0.19: with tensor parallelism, latent attention gathers its latent queries and keys over the ranks of
   Megatron's own state, whatever groups the layer was given.

Each mend looks whether its bug is there: 1 and 2 are gone in 0.19.
"""

import functools

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from megakd.config import Model, Parallel


def mend() -> None:
    """Mends the first two bugs, of which Transformer Engine is free, and the fourth."""
    attention = multi_latent_attention.MLASelfAttention
    upstream = getattr(attention, "_resolve_qk_norm_config", None)
    if upstream is not None and upstream.__module__ != __name__:

        def resolve(self, submodules):
            if self.config.q_lora_rank is not None:
                return upstream(self, submodules)
            named = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
            return {name: getattr(submodules, name) for name in named}

        attention._resolve_qk_norm_config = resolve
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        multi_latent_attention.HAVE_TE = False


def moe_fields(model: Model, parallel: Parallel, transformer_engine: bool) -> dict:
    """TransformerConfig's fields for the experts. Routing is in float32; losses on it: megakd.models.routing."""
    moe = model.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": 1 if parallel.ep > 1 else parallel.tp,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": 1 if moe.layers is None else [int(i in moe.layers) for i in range(model.num_layers)],
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_router_score_function": moe.score,
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize,
        "moe_router_topk_scaling_factor": None if moe.scaling_factor == 1.0 else moe.scaling_factor,
        "moe_router_enable_expert_bias": moe.bias,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall" if transformer_engine else "allgather",
    }


def mla_fields(model: Model) -> dict:
    """MLATransformerConfig's fields; its defaults scale the softmax as if rope were stretched 40 times."""
    mla, scaling = model.mla, model.rope_scaling
    fields = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "rope",
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }
    if scaling is not None:
        fields |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
        }
    return fields


def share_latents(gpt) -> None:
    """Mends the third bug and the fifth: Megatron gets latents that are whole already, over the layer's own ranks.

    The gradients of the keys' rotated channels are summed over them; with sequence parallelism Megatron does that
    itself where the layer's output is whole.
    """
    for module in gpt.modules():
        if isinstance(module, multi_latent_attention.MLASelfAttention):
            config, tp = module.config, gpt.pg_collection.tp
            module.linear_kv_down_proj.register_forward_hook(functools.partial(_whole_keys, config, tp))
            if config.q_lora_rank is not None:
                module.linear_q_down_proj.register_forward_hook(functools.partial(_whole_queries, config, tp))


def _whole_keys(config, tp, _layer, _inputs, output):
    """Forward hook of the projection [S, B, latent and rotated channels], whichever of them this rank has computed."""
    kv, bias = output
    widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
    kv = _whole(config, tp, kv, sum(widths))
    if not config.sequence_parallel:
        latent, rotated = kv.split(widths, -1)
        kv = torch.cat([latent, _SumGradients.apply(rotated, tp)], -1)
    return kv, bias


def _whole_queries(config, tp, _layer, _inputs, output):
    """Forward hook of the projection [S, B, latent channels]."""
    queries, bias = output
    return _whole(config, tp, queries, config.q_lora_rank), bias


def _whole(config, tp, x, width: int):
    """All channels of this rank's positions, whatever part of them this rank has computed."""
    if x.shape[-1] == width:
        return x
    x = tensor_parallel.gather_from_tensor_model_parallel_region(x, group=tp)
    return tensor_parallel.scatter_to_sequence_parallel_region(x, group=tp) if config.sequence_parallel else x


class _SumGradients(torch.autograd.Function):
    """The identity; its gradient is all-reduced over tp. Megatron's own returns a strided gradient as it was."""

    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.tp)
        return grad, None


def keep_router_biases_whole(gpt) -> None:
    """The biases that choose experts stay float32 in a bf16 model, before they are loaded already."""
    for module in gpt.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
