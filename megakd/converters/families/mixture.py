"""Mixtures of experts: Mixtral, OLMoE, Qwen 2 and 3, and DeepSeek with its latent attention."""

from collections.abc import Iterator

from megakd.config import Model
from megakd.converters.families.family import Family, activation, cannot_express, plain_fields, rope_parameters
from megakd.converters.families.llama import gated_fields, window_fields
from megakd.converters.families.parts import FEED_FORWARD_NORM, INPUT_NORM, attention, ends, gated_block, layers, norm
from megakd.converters.rules import Rule, copy, stack

SPLIT = ("gate_proj", "up_proj", "down_proj")


def experts(model: Model, ours: str, theirs: str, names: tuple[str, str, str] = SPLIT) -> Iterator[Rule]:
    """The router and the experts; their names are gate, up and down."""
    gate, up, down = names
    yield copy(f"{ours}router.weight", f"{theirs}gate.weight")
    for e in range(model.moe.num_experts):
        expert, own = f"{theirs}experts.{e}.", f"{ours}experts.{e}."
        yield stack(f"{own}linear_fc1.weight", f"{expert}{gate}.weight", f"{expert}{up}.weight")
        yield copy(f"{own}linear_fc2.weight", f"{expert}{down}.weight")


def mixtral_model(config) -> dict:
    moe = {
        "num_experts": config.num_local_experts,
        "top_k": config.num_experts_per_tok,
        "ffn_hidden_size": config.intermediate_size,
    }
    return gated_fields(config) | window_fields(config, True, getattr(config, "layer_types", None)) | {"moe": moe}


def mixtral_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    for _, ours, theirs in layers(model):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm")
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
        yield from norm(model, f"{ours}pre_mlp_layernorm.", f"{theirs}post_attention_layernorm")
        yield from experts(model, f"{ours}mlp.", f"{theirs}block_sparse_moe.", ("w1", "w3", "w2"))


def qwen_moe(config) -> dict:
    sparse = [
        i
        for i in range(config.num_hidden_layers)
        if i not in (config.mlp_only_layers or []) and (i + 1) % config.decoder_sparse_step == 0
    ]
    return {
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "ffn_hidden_size": config.moe_intermediate_size,
        "layers": None if len(sparse) == config.num_hidden_layers else sparse,
        "normalize": bool(config.norm_topk_prob),
    }


def qwen2_moe_model(config) -> dict:
    moe = qwen_moe(config) | {"shared_ffn_hidden_size": config.shared_expert_intermediate_size, "shared_gate": True}
    windows = window_fields(config, config.use_sliding_window, getattr(config, "layer_types", None))
    return gated_fields(config) | {"add_qkv_bias": bool(getattr(config, "qkv_bias", True)), "moe": moe} | windows


def qwen3_moe_model(config) -> dict:
    if config.attention_bias:
        raise cannot_express(config, "attention_bias is true, which biases the output projection too")
    windows = window_fields(config, config.use_sliding_window, getattr(config, "layer_types", None))
    return gated_fields(config) | {"qk_norm": True, "moe": qwen_moe(config)} | windows


def olmoe_model(config) -> dict:
    if config.attention_bias or config.clip_qkv is not None:
        raise cannot_express(config, "attention_bias is true, or queries, keys and values are clipped (clip_qkv)")
    moe = {
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "ffn_hidden_size": config.intermediate_size,
        "normalize": bool(config.norm_topk_prob),
    }
    return gated_fields(config) | {"qk_norm": True, "qk_norm_over": "all_heads", "moe": moe}


def qwen_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    for i, ours, theirs in layers(model):
        yield from norm(model, ours + INPUT_NORM, f"{theirs}input_layernorm")
        yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
        yield from mixed_block(model, i, ours, theirs, "shared_expert")


def mixed_block(model: Model, number: int, ours: str, theirs: str, shared: str) -> Iterator[Rule]:
    """A layer's experts with the norm before them, or its ordinary block."""
    their_norm, block = f"{theirs}post_attention_layernorm", f"{theirs}mlp."
    if not model.has_experts(number):
        yield from norm(model, ours + FEED_FORWARD_NORM, their_norm)
        yield from gated_block(model, f"{ours}mlp.", block)
        return
    yield from norm(model, f"{ours}pre_mlp_layernorm.", their_norm)
    yield from experts(model, f"{ours}mlp.", block)
    if model.moe.bias:
        yield copy(f"{ours}mlp.router.expert_bias", f"{block}gate.e_score_correction_bias")
    if model.moe.shared_ffn_hidden_size:
        yield from gated_block(model, f"{ours}mlp.shared_experts.", f"{block}{shared}.")
    if model.moe.shared_gate:
        yield copy(f"{ours}mlp.shared_experts.gate_weight", f"{block}shared_expert_gate.weight")


def deepseek_fields(config) -> dict:
    if config.attention_bias or not getattr(config, "rope_interleave", True):
        raise cannot_express(config, "attention_bias is true, or rope does not take its channels in pairs")
    rope = rope_parameters(config)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "yarn"):
        raise cannot_express(config, f"rope type {kind!r}; expected default or yarn")
    fields = plain_fields(config, {"rope_theta": rope.get("rope_theta", 10000.0)}) | {
        "activation": activation(config, {"silu": "swiglu", "swish": "swiglu"}, config.hidden_act),
        "num_query_groups": config.num_attention_heads,
        "kv_channels": None,
        "mla": {
            "q_lora_rank": config.q_lora_rank,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_head_dim": config.qk_nope_head_dim,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
        },
    }
    if kind == "yarn":
        fields["rope_scaling"] = {
            "kind": "yarn",
            "factor": float(rope["factor"]),
            "original_length": int(rope["original_max_position_embeddings"]),
            "beta_fast": float(rope.get("beta_fast") or 32),
            "beta_slow": float(rope.get("beta_slow") or 1),
            "mscale": float(rope.get("mscale") or 1),
            "mscale_all_dim": float(rope.get("mscale_all_dim") or 0),
        }
    return fields


def deepseek_moe(config) -> dict:
    dense = config.first_k_dense_replace
    return {
        "num_experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "ffn_hidden_size": config.moe_intermediate_size,
        "layers": list(range(dense, config.num_hidden_layers)) if dense else None,
        "shared_ffn_hidden_size": (config.n_shared_experts or 0) * config.moe_intermediate_size or None,
        "scaling_factor": float(config.routed_scaling_factor),
    }


def deepseek_v2_model(config) -> dict:
    moe = deepseek_moe(config) | {"normalize": False}
    if config.topk_method == "group_limited_greedy" and config.n_group > 1:
        if config.num_experts_per_tok // config.topk_group > 1:
            raise cannot_express(
                config,
                f"groups of experts are chosen by their best expert, Megatron sums their best "
                f"{config.num_experts_per_tok // config.topk_group}",
            )
        moe |= {"num_groups": config.n_group, "group_top_k": config.topk_group}
    elif config.topk_method not in ("greedy", "group_limited_greedy"):
        raise cannot_express(config, f"topk_method {config.topk_method!r}")
    return deepseek_fields(config) | {"moe": moe}


def deepseek_v3_model(config) -> dict:
    moe = deepseek_moe(config) | {"score": "sigmoid", "bias": True}
    if not config.norm_topk_prob or config.num_experts_per_tok == 1:
        raise cannot_express(config, "the chosen experts' scores are not normalised; Megatron's sigmoid router does")
    if config.n_group > 1:
        if config.num_experts_per_tok // config.topk_group != 2:
            raise cannot_express(config, "groups are chosen by their best two experts, Megatron by another number")
        moe |= {"num_groups": config.n_group, "group_top_k": config.topk_group}
    return deepseek_fields(config) | {"moe": moe}


def deepseek_rules(model: Model) -> Iterator[Rule]:
    yield from ends(model)
    for i, ours, theirs in layers(model):
        own, their = f"{ours}self_attention.", f"{theirs}self_attn."
        yield from norm(model, f"{ours}input_layernorm.", f"{theirs}input_layernorm")
        if model.mla.q_lora_rank is None:
            yield copy(f"{own}linear_q_proj.weight", f"{their}q_proj.weight")
        else:
            yield copy(f"{own}linear_q_down_proj.weight", f"{their}q_a_proj.weight")
            yield copy(f"{own}linear_q_up_proj.layer_norm_weight", f"{their}q_a_layernorm.weight")
            yield copy(f"{own}linear_q_up_proj.weight", f"{their}q_b_proj.weight")
        yield copy(f"{own}linear_kv_down_proj.weight", f"{their}kv_a_proj_with_mqa.weight")
        yield copy(f"{own}linear_kv_up_proj.layer_norm_weight", f"{their}kv_a_layernorm.weight")
        yield copy(f"{own}linear_kv_up_proj.weight", f"{their}kv_b_proj.weight")
        yield copy(f"{own}linear_proj.weight", f"{their}o_proj.weight")
        yield from mixed_block(model, i, ours, theirs, "shared_experts")


FAMILIES = [
    Family("mixtral", "MixtralForCausalLM", mixtral_model, mixtral_rules),
    Family("olmoe", "OlmoeForCausalLM", olmoe_model, qwen_rules, refused="attention_bias, clip_qkv"),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", qwen2_moe_model, qwen_rules),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe_model, qwen_rules, refused="attention_bias"),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        deepseek_v2_model,
        deepseek_rules,
        refused="group_limited_greedy with several experts a group (the full V2)",
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        deepseek_v3_model,
        deepseek_rules,
        refused="FP8 weights; scores that are not normalised",
    ),
]
