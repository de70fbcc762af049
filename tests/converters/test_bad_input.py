"""What is wrong with a source is named, and nothing is left at the destination."""

import json
import pickle
import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.checkpoints import folder
from megakd.checkpoints.record import write_record
from megakd.checkpoints.torch_dist_reader import TorchDistReader
from megakd.converters.convert import Options, convert
from megakd.errors import CheckpointError
from tests.converters import hf_models

UNVERIFIED = Options(verify=False)


@pytest.fixture
def source(tmp_path):
    return hf_models.build("llama2", tmp_path / "hf")


def refused(source, words, target_format="megatron"):
    destination = source.parent / "out"
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(source, destination, target_format, UNVERIFIED)
    assert caught.value.hint
    assert not destination.exists() and not folder.incomplete(destination).exists()


def edit_config(source, **changes):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(source, edit):
    weights = load_file(source / "model.safetensors")
    edit(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def test_truncated_safetensors(source):
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    refused(source, "header describes")
    (source / "model.safetensors").write_bytes(data[:50])
    refused(source, "no safetensors file")


def test_missing_and_mixed_shards(source):
    names = sorted(load_file(source / "model.safetensors"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, inside in halves.items():
        save_file({n: weights[n] for n in inside}, source / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, inside in halves.items() for n in inside}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, source.parent / "whole", "megatron", UNVERIFIED)
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, "index and the files disagree about 1 tensors: model.norm.weight")
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, "1 of 2 files of the shard index are missing: model-00002")


def test_unknown_architecture_and_other_heads(source):
    edit_config(source, model_type="mamba2", architectures=["Mamba2ForCausalLM"])
    refused(source, "unknown architecture: model_type 'mamba2'")
    edit_config(source, model_type="phi", architectures=["PhiForCausalLM"])
    refused(source, "a PhiForCausalLM cannot be expressed exactly: its head has a bias")
    edit_config(source, model_type="gpt_oss", architectures=["GptOssForCausalLM"])
    refused(source, "a GptOssForCausalLM cannot be expressed exactly: its router and experts have biases")
    edit_config(source, model_type="llama", architectures=["LlamaForSequenceClassification"])
    refused(source, "LlamaForSequenceClassification")


def test_quantised_weights(source):
    edit_config(source, quantization_config={"quant_method": "fp8"})
    refused(source, r"quantised \(fp8\)")


def test_what_cannot_be_expressed(source):
    edit_config(source, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    refused(source, "rope type 'dynamic'")
    edit_config(source, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attention_bias=True)
    refused(source, "attention_bias is True and mlp_bias False")


def test_missing_and_extra_keys(source):
    def edit(weights):
        del weights["model.layers.2.mlp.up_proj.weight"]
        weights["model.layers.2.mlp.up.weight"] = torch.zeros(3)

    edit_weights(source, edit)
    refused(source, r"(?s)missing: model.layers.2.mlp.up_proj.weight.*left over: model.layers.2.mlp.up.weight")


def test_nan_weights(source):
    def edit(weights):
        weights["model.layers.3.mlp.down_proj.weight"][5, 7] = float("nan")

    edit_weights(source, edit)
    refused(source, "model.layers.3.mlp.down_proj.weight holds NaN")


def test_config_of_another_model(source):
    edit_config(source, vocab_size=300)
    refused(source, r"embed_tokens.*makes .*\[251, 48\], config.json \[300, 48\]")
    edit_config(source, vocab_size=251, num_hidden_layers=3)
    refused(source, "left over: model.layers.3")
    edit_config(source, num_hidden_layers="four")
    refused(source, "config.json")
    (source / "config.json").write_text("{")
    refused(source, "config.json cannot be read")


def test_tokenizer_of_another_model(source):
    vocab = {"model": {"vocab": {f"t{i}": i for i in range(251)}}, "added_tokens": [{"id": 250}]}
    (source / "tokenizer.json").write_text(json.dumps(vocab))
    convert(source, source.parent / "fits", "megatron", UNVERIFIED)
    vocab["added_tokens"] = [{"id": 251, "content": "<new>"}]
    (source / "tokenizer.json").write_text(json.dumps(vocab))
    refused(source, "ids up to 251, the embedding has 251 rows")


def test_a_head_that_is_said_to_be_tied_but_is_not(source):
    edit_config(source, tie_word_embeddings=True)
    refused(source, "lm_head.weight differs")


def test_weights_of_mixed_types(source):
    def edit(weights):
        weights["model.layers.1.self_attn.k_proj.weight"] = weights["model.layers.1.self_attn.k_proj.weight"].bfloat16()

    edit_weights(source, edit)
    refused(source, "of different types")


def test_a_pickle_that_runs_code(source):
    class Bomb:
        def __reduce__(self):
            return (tarfile.open, ("never",))

    (source / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, source / "pytorch_model.bin")
    refused(source, r"pytorch_model\.bin refers to __builtin__\.getattr")


def test_a_torch_dist_description_that_runs_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tarfile.open, ("never",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"\.metadata refers to builtins\.getattr"):
        TorchDistReader(tmp_path)


def test_destination_that_exists_is_left_alone(source, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        convert(source, tmp_path / "there", "megatron", UNVERIFIED)
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_neither_format(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither config"):
        convert(tmp_path, tmp_path / "out", "megatron", UNVERIFIED)


def test_checkpoint_with_missing_or_unknown_weights(source, tmp_path):
    destination = tmp_path / "megatron"
    convert(source, destination, "megatron", UNVERIFIED)
    record = json.loads((destination / "megakd.json").read_text())
    record["model"]["qk_norm"] = True
    write_record(destination, record)
    with pytest.raises(CheckpointError, match=r"no Hugging Face architecture|missing: .*q_layernorm"):
        convert(destination, tmp_path / "out", "hf", UNVERIFIED)
    assert not (tmp_path / "out").exists()
