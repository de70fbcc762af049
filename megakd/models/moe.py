"""Experts and latent attention: the fields of Megatron's config for them, and two upstream bugs mended.

1. megatron-core 0.16.1, no Transformer Engine: every router's forward raises NameError (te_general_gemm).
2. The same: latent attention compares its layers with a mock of TELinear and raises TypeError.
"""

from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from megakd.config import Model


def mend() -> None:
    """Mend both bugs; does nothing with Transformer Engine."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        multi_latent_attention.HAVE_TE = False


def moe_fields(model: Model, transformer_engine: bool) -> dict:
    """TransformerConfig's fields for the experts. Routing is in float32, without a loss that balances the load."""
    moe = model.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
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


def keep_router_biases_whole(gpt) -> None:
    """The biases that choose experts stay float32 in a bf16 model, before they are loaded already."""
    for module in gpt.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
