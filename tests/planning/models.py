"""Model sections that between them have every kind of parameter."""

PLAIN = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 88,
    "num_attention_heads": 4,
    "max_sequence_length": 56,
    "vocab_size": 1500,
}
EXPERTS = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 24}
LATENT = {"kv_lora_rank": 20, "qk_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
KINDS = {
    "llama": {"num_query_groups": 2, "tie_embeddings": False},
    "qwen2": {"num_query_groups": 2, "add_qkv_bias": True},
    "qwen3": {"num_query_groups": 2, "qk_norm": True, "kv_channels": 16},
    "olmo2": {"qk_norm": True, "qk_norm_over": "all_heads", "pre_norms": False, "post_norms": True},
    "gpt2": {
        "normalization": "LayerNorm",
        "activation": "gelu_tanh",
        "add_bias_linear": True,
        "position_embedding": "learned_absolute",
    },
    "falcon": {
        "normalization": "LayerNorm",
        "activation": "gelu",
        "num_query_groups": 2,
        "parallel_residual": True,
        "shared_norm": True,
    },
    "gemma2": {"post_norms": True, "norm_zero_centered": True, "activation": "geglu_tanh", "logit_softcap": 30.0},
    "nemotron": {"normalization": "LayerNorm", "activation": "squared_relu", "tie_embeddings": False},
    "mixtral": {"num_query_groups": 2, "moe": EXPERTS},
    "qwen2_moe": {
        "add_qkv_bias": True,
        "moe": EXPERTS | {"layers": [1, 3], "shared_ffn_hidden_size": 40, "shared_gate": True},
    },
    "deepseek": {"mla": LATENT, "moe": EXPERTS | {"layers": [1, 2, 3], "shared_ffn_hidden_size": 24}},
    "deepseek_q": {"mla": LATENT | {"q_lora_rank": 28}, "tie_embeddings": False},
}


def section(kind: str, **changes):
    from megakd.config import Model

    return Model(**PLAIN | KINDS[kind] | changes)
