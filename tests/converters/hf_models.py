"""Tiny randomised models of every family, made with transformers: norms and biases too, which its own init hides."""

import pathlib

import torch

SIZES = {
    "vocab_size": 251,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 251, "n_embd": 48, "n_inner": 56, "n_layer": 4, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 56, "word_embed_proj_dim": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ODD_LLAMA3 = {
    **LLAMA3,
    "rope_theta": 10000.0,
    "factor": 4.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707,
    }
}  # fmt: skip
GEMMA = {"head_dim": 16, "pad_token_id": 0, "tie_word_embeddings": True}
GEMMA2 = {
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA3 = {
    **GEMMA2,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}
PARTLY = {**WINDOWED, "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}

FALCON = {"ffn_hidden_size": 56, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 1}
GRANITE = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 0.5,
    "pad_token_id": 0,
}  # fmt: skip

CASES = {  # name -> (model_type, changes of SIZES)
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama31": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama31_odd": ("llama", {"rope_parameters": ODD_LLAMA3}),
    "llama32_tied": ("llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_group": ("llama", {"num_key_value_heads": 1}),
    "llama_v4": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", PARTLY),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": 8}),
    "smollm3": ("smollm3", {"pad_token_id": 0, "no_rope_layers": [1, 1, 0, 1]}),
    "arcee": ("arcee", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {"sliding_window": 8, "tie_word_embeddings": True}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", {**OPT, "tie_word_embeddings": True}),
    "opt_untied": ("opt", OPT),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "gpt_neox_parallel": ("gpt_neox", {"use_parallel_residual": True, "rotary_pct": 0.5}),
    "falcon": ("falcon", FALCON),
    "falcon_many_groups": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_one_norm": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_in_sequence": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "granite": ("granite", GRANITE),
    "granite_tied": ("granite", {**GRANITE, "tie_word_embeddings": True, "logits_scaling": 3.0}),
    "olmo2": ("olmo2", {"pad_token_id": 0}),
    "gemma": ("gemma", {**GEMMA, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, **GEMMA2}),
    "gemma3": ("gemma3_text", {**GEMMA, **GEMMA3}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {**MOE, "intermediate_size": 24, "pad_token_id": 0, "norm_topk_prob": False}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe_partly": ("qwen3_moe", {**MOE, "norm_topk_prob": False, "mlp_only_layers": [1], "head_dim": 16}),
    "deepseek_v2": ("deepseek_v2", {**MLA, "topk_method": "greedy", "q_lora_rank": 24}),
    "deepseek_v2_lite": ("deepseek_v2", {**MLA, "topk_method": "greedy", "q_lora_rank": None, **YARN}),
    "deepseek_v3": ("deepseek_v3", {**MLA, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
}
ZERO_CENTERED = {"nemotron", "gemma", "gemma2", "gemma3_text"}


def build(case: str, path: pathlib.Path, **changes) -> pathlib.Path:
    """Save one case as a Hugging Face folder, bf16-valued float32 weights from a fixed seed."""
    import transformers

    model_type, fields = CASES[case]
    sizes = {} if model_type == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **fields, **changes})
    torch.manual_seed(sorted(CASES).index(case))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, zero_centered=model_type in ZERO_CENTERED)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def randomize(model, *, zero_centered: bool) -> None:
    state = dict(model.named_parameters()) | {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    for name, tensor in state.items():
        is_gain = tensor.dim() == 1 and "norm" in name.replace("ln_", "norm") and name.endswith("weight")
        mean = 1.0 if is_gain and not zero_centered else 0.0
        tensor.copy_(mean + 0.25 * torch.randn(tensor.shape))


def logits(path: pathlib.Path, ids_PS: torch.Tensor) -> torch.Tensor:
    """[P, S, V] of transformers' own loader, eager attention, float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(input_ids=ids_PS, use_cache=False).logits
