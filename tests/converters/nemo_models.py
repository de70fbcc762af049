"""Synthetic `.nemo` files in every layout, and what they compute: written from one set of plain tensors.

A model is drawn as one rank's tensors by Megatron-Core's names, then cut, renamed and packed as NeMo did.
"""

import json
import pathlib
import re
import tarfile

import numpy as np
import torch
import yaml

SIZES = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 4, "encoder_seq_length": 64}
ROPE = {"position_embedding_type": "rope", "rotary_percentage": 0.5, "bias": False}
GPT2B = {  # the options of GPT-2B-001
    **SIZES, **ROPE, "max_position_embeddings": 64, "kv_channels": None, "normalization": "layernorm1p",
    "layernorm_epsilon": 1e-5, "activation": "fast-swiglu", "share_embeddings_and_output_weights": False,
    "apply_query_key_layer_scaling": True, "megatron_amp_O2": True, "make_vocab_size_divisible_by": 128,
}  # fmt: skip
NMGPT = {  # NeMo's defaults: a GPT-2
    **SIZES, "max_position_embeddings": "${.encoder_seq_length}", "normalization": "layernorm", "activation": "gelu",
    "bias": True, "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True,
}  # fmt: skip
CORE = {**GPT2B, "mcore_gpt": True, "normalization": "rmsnorm", "num_query_groups": 2}
CASES = {  # name -> (config, layout, tensor parallel, pipeline parallel)
    "gpt2b": (GPT2B, "old", 1, 1),
    "gpt2b_tp2": (GPT2B, "old", 2, 1),
    "gpt2b_tp2_pp2": (GPT2B, "old", 2, 2),
    "gpt2b_gz": (GPT2B, "old", 1, 1),
    "plain_swiglu": ({**GPT2B, "activation": "swiglu"}, "old", 2, 1),
    "nmgpt": (NMGPT, "old", 1, 1),
    "nmgpt_erf_pp2": ({**NMGPT, "bias_activation_fusion": False}, "old", 1, 2),
    "queries_first": ({**NMGPT, "megatron_legacy": True}, "legacy", 2, 1),
    "te": ({**NMGPT, "transformer_engine": True, "mcore_gpt": False}, "te", 2, 1),
    "core_tp2": (CORE, "core", 2, 1),
    "core_torch_dist": (CORE, "torch_dist", 1, 1),
    "core_zarr": (CORE, "zarr", 1, 1),
    "core_zarr_nemotron": (
        {**CORE, "normalization": "layernorm1p", "activation": "squared-relu", "scale_positional_embedding": True},
        "zarr", 1, 1,
    ),
}  # fmt: skip
VOCAB, PADDED = 251, 256


def draw(config: dict) -> dict[str, torch.Tensor]:
    """All tensors by Megatron-Core's names, one rank, bf16-valued."""
    torch.manual_seed(7)
    h, f, n = config["hidden_size"], config["ffn_hidden_size"], config["num_attention_heads"]
    d, g = h // n, config.get("num_query_groups") or n
    shapes = {"embedding.word_embeddings.weight": (PADDED, h)}
    if config["position_embedding_type"] == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (config["encoder_seq_length"], h)
    if not config["share_embeddings_and_output_weights"]:
        shapes["output_layer.weight"] = (PADDED, h)
    for i in range(config["num_layers"]):
        layer = f"decoder.layers.{i}."
        shapes |= {
            f"{layer}self_attention.linear_qkv.weight": ((n + 2 * g) * d, h),
            f"{layer}self_attention.linear_proj.weight": (h, h),
            f"{layer}mlp.linear_fc1.weight": (f * (2 if "glu" in config["activation"] else 1), h),
            f"{layer}mlp.linear_fc2.weight": (h, f),
            f"{layer}self_attention.linear_qkv.layer_norm_weight": (h,),
            f"{layer}mlp.linear_fc1.layer_norm_weight": (h,),
        }
    shapes["decoder.final_layernorm.weight"] = (h,)
    for name, shape in list(shapes.items()):
        is_norm = "norm" in name
        if (is_norm and config["normalization"] != "rmsnorm") or (not is_norm and config["bias"] and "layers" in name):
            shapes[name.replace("weight", "bias")] = shape[:1]
    zero_centered = config["normalization"] == "layernorm1p"
    gain = {True: 0.0, False: 1.0}[zero_centered]
    return {
        name: (gain * ("norm" in name and name.endswith("weight")) + 0.25 * torch.randn(shape)).bfloat16().float()
        for name, shape in shapes.items()
    }


def cut(name: str, tensor: torch.Tensor, config: dict, ranks: int) -> list[torch.Tensor]:
    """A tensor's piece of each tensor parallel rank; gate and up are cut each for itself and packed."""
    if re.search(r"linear_fc1\.(weight|bias)$", name) and "glu" in config["activation"]:
        gate, up = (half.chunk(ranks) for half in tensor.chunk(2))
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    if re.search(r"(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(weight|bias)$", name):
        return list(tensor.chunk(ranks))
    if re.search(r"(linear_proj|linear_fc2)\.weight$", name):
        return [piece.contiguous() for piece in tensor.chunk(ranks, 1)]
    return [tensor] * ranks


OLD = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}
TE = {
    "self_attention.linear_qkv.": "self_attention.layernorm_qkv.",
    "self_attention.linear_proj.": "self_attention.proj.",
    "mlp.linear_fc1.layer_norm_": "layernorm_mlp.layer_norm_",
    "mlp.linear_fc1.": "layernorm_mlp.fc1_",
    "mlp.linear_fc2.": "layernorm_mlp.fc2_",
}


def rename(name: str, layout: str) -> str:
    if layout == "core":
        return f"model.{name}"
    for ours, theirs in (TE if layout == "te" else OLD).items():
        name = name.replace(ours, theirs)
    if layout == "legacy":
        name = name.replace("self_attention", "attention")
    block = "transformer" if layout == "legacy" else "encoder"
    return f"model.language_model.{name.replace('decoder.', block + '.')}"


def rank_state(tensors, config, layout, tp_rank, tp, pp_rank, pp) -> dict[str, torch.Tensor]:
    """What one rank's model_weights.ckpt holds."""
    state, per_stage = {}, config["num_layers"] // pp
    heads = config["num_attention_heads"] // tp
    for name, tensor in tensors.items():
        if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
            stage, number = divmod(int(layer[1]), per_stage)
            local = f"decoder.layers.{number}.{name[layer.end() :]}"
        else:
            stage, local = (0 if name.startswith("embedding") else pp - 1), name
        if stage != pp_rank:
            continue
        piece = cut(name, tensor, config, tp)[tp_rank]
        if layout == "legacy" and re.search(r"linear_qkv\.(weight|bias)$", name):
            piece = piece.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        theirs = rename(local, layout)
        if "dense_h_to_4h." in theirs and config["activation"] == "swiglu":
            gate, up = piece.chunk(2)
            state[theirs] = gate.clone()
            state[theirs.replace("4h.", "4h_2.")] = up.clone()
        else:
            state[theirs] = piece.clone()
    if layout in ("old", "core") and config["position_embedding_type"] == "rope":
        state["model.language_model.rotary_pos_emb.inv_freq"] = torch.ones(3)
    if layout in ("te", "core"):
        state[f"{rename('decoder.layers.0.self_attention.linear_qkv.', layout)}_extra_state"] = torch.ones(2)
    if config["share_embeddings_and_output_weights"] and pp_rank == pp - 1 and pp > 1:
        state["model.word_embeddings.weight"] = cut("word_embeddings.weight", tensors[EMBEDDING], config, tp)[tp_rank]
    return state


EMBEDDING = "embedding.word_embeddings.weight"


def write_distributed(folder: pathlib.Path, tensors, config: dict, layout: str) -> None:
    from megakd.checkpoints.layout import Place
    from megakd.checkpoints.torch_dist_files import TorchDistWriter

    layers = config["num_layers"]
    stacked = {}
    for name, tensor in tensors.items():
        if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
            stacked.setdefault(f"model.decoder.layers.{name[layer.end() :]}", []).append(tensor)
        else:
            stacked[f"model.{name}"] = tensor
    folder.mkdir(parents=True)
    if layout == "zarr":
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
        for name, value in stacked.items():
            write_zarr(folder / name, torch.stack(value) if isinstance(value, list) else value)
        return
    with TorchDistWriter(folder) as writer:
        for name, value in stacked.items():
            if isinstance(value, list):
                for i, tensor in enumerate(value):
                    writer.write(Place(name, (i,), (layers,)), tensor)
            else:
                writer.write(Place(name, (), ()), value)
        writer.finish({})


def write_zarr(folder: pathlib.Path, tensor: torch.Tensor) -> None:
    """A bf16 array, layer by layer, its first own axis in two chunks of which the last is not full."""
    stacked = tensor.dim() == 3 or (tensor.dim() == 2 and "layers" in folder.name)
    chunks = list(tensor.shape)
    chunks[0] = 1 if stacked else chunks[0]
    axis = 1 if stacked else 0
    chunks[axis] = chunks[axis] // 2 + 1
    folder.mkdir()
    description = {"zarr_format": 2, "shape": list(tensor.shape), "chunks": chunks, "dtype": "bfloat16"}
    (folder / ".zarray").write_text(json.dumps({**description, "compressor": None, "filters": None, "order": "C"}))
    values = tensor.bfloat16().view(torch.uint16).numpy()
    for number in np.ndindex(*[-(-size // chunk) for size, chunk in zip(tensor.shape, chunks, strict=True)]):
        low = [n * c for n, c in zip(number, chunks, strict=True)]
        part = values[tuple(slice(a, a + c) for a, c in zip(low, chunks, strict=True))]
        whole = np.zeros(chunks, np.uint16)
        whole[tuple(slice(size) for size in part.shape)] = part
        whole.tofile(folder / ".".join(map(str, number)))


def build(case: str, path: pathlib.Path, tokenizer: pathlib.Path | None = None) -> dict[str, torch.Tensor]:
    """Write one case as the archive `path`; returns its tensors by our names, vocabulary cut to VOCAB."""
    config, layout, tp, pp = CASES[case]
    tensors = draw({**config, "encoder_seq_length": 64})
    folder = path.with_suffix("")
    folder.mkdir()
    if layout in ("torch_dist", "zarr"):
        write_distributed(folder / "model_weights", tensors, config, layout)
    else:
        for t in range(tp):
            for p in range(pp):
                name = f"tp_rank_{t:02}_pp_rank_{p:03}/" if pp > 1 else f"mp_rank_{t:02}/" if tp > 1 else ""
                (folder / name).mkdir(exist_ok=True)
                torch.save(rank_state(tensors, config, layout, t, tp, p, pp), folder / name / "model_weights.ckpt")
    config = dict(config)
    if tokenizer is None:
        config["override_vocab_size"] = VOCAB
    else:
        artifact = f"{'0123456789abcdef' * 2}_{tokenizer.name}"
        (folder / artifact).write_bytes(tokenizer.read_bytes())
        config["tokenizer"] = {"library": "sentencepiece", "model": f"nemo:{artifact}"}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    with tarfile.open(path, "w:gz" if case.endswith("gz") else "w:") as tar:
        tar.add(folder, arcname="./" if case != "gpt2b" else "")
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: tensor[:VOCAB] if name in names else tensor for name, tensor in tensors.items()}
