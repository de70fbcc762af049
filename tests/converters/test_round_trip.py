"""The ways a Hugging Face folder may look, and what comes back of it; models that never were one; direct use."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.checkpoints import folder
from megakd.config import Model
from megakd.converters.convert import Options, convert
from megakd.converters.direct import content_key, converted, find_checkpoint, open_checkpoint
from megakd.converters.families import FAMILIES, config_of, model_section
from megakd.converters.huggingface.importing import open_hf
from megakd.errors import CheckpointError
from tests.converters import hf_models
from tests.converters.gpt_ranks import load_and_save
from tests.ranks import run_ranks

UNVERIFIED = Options(verify=False)


def there_and_back(source, **options):
    """The folder that comes back, and its tensors."""
    root = source.parent
    convert(source, root / "megatron", "megatron", UNVERIFIED)
    convert(root / "megatron", root / "back", "hf", Options(verify=False, **options))
    weights = {}
    for file in sorted((root / "back").glob("*.safetensors")):
        weights |= load_file(file)
    return root / "back", weights


def same(weights, wanted):
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name


def test_sharded_bf16_with_index_comes_back_shard_by_shard(tmp_path):
    import transformers

    source = hf_models.build("qwen3", tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    back, _ = there_and_back(tmp_path / "hf")
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert len(files) > 4
    for name in files:
        assert (back / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_files_are_cut_at_the_asked_size(tmp_path):
    source = hf_models.build("llama2", tmp_path / "hf")
    wanted = load_file(source / "model.safetensors")
    torch.save(wanted, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    back, weights = there_and_back(source, max_shard_bytes=40_000)
    same(weights, wanted)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(wanted)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    assert len(set(index["weight_map"].values())) > 4
    assert max(p.stat().st_size for p in back.glob("*.safetensors")) < 60_000
    ids = torch.arange(20)[None]
    torch.testing.assert_close(hf_models.logits(back, ids), hf_models.logits(source, ids), atol=0, rtol=0)


def test_sharded_bin_files_of_either_zip_or_old_kind(tmp_path):
    source = hf_models.build("mistral", tmp_path / "hf")
    wanted = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(wanted)
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({n: wanted[n] for n in part}, source / file, _use_new_zipfile_serialization=i == 0)
        weight_map |= dict.fromkeys(part, file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, weights = there_and_back(source)
    same(weights, wanted)


def test_stored_head_of_a_tied_model_and_constants_are_given_back(tmp_path):
    source = hf_models.build("gpt2", tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    for i in range(4):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt", "origin": "a hub"})
    back, again = there_and_back(source)
    same(again, weights)
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_files_of_the_bare_model_lack_the_prefix(tmp_path):
    source = hf_models.build("gpt2", tmp_path / "hf")
    weights = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    _, again = there_and_back(source)
    same(again, weights)


def test_both_dialects_of_config_json_are_one_model(tmp_path):
    source = hf_models.build("llama31", tmp_path / "hf")
    new = json.loads((source / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = {**new, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": new.pop("dtype")}
    del old["dtype"]
    wanted = open_hf(source).model
    assert wanted.rope_scaling.kind == "llama3" and wanted.rotary_base == 500000.0
    (source / "config.json").write_text(json.dumps(old))
    assert open_hf(source).model == wanted
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    (source / "config.json").write_text(json.dumps(old))
    assert open_hf(source).model == wanted


def test_tokenizer_and_generation_config_travel(tmp_path):
    source = hf_models.build("llama2", tmp_path / "hf")
    files = {
        "tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []},
        "tokenizer_config.json": {"bos_token": "a"},
        "special_tokens_map.json": {"eos_token": "b"},
        "generation_config.json": {"eos_token_id": [1, 3], "bos_token_id": 0},
    }
    for name, value in files.items():
        (source / name).write_text(json.dumps(value))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    back, _ = there_and_back(source)
    assert folder.read_checkpoint(tmp_path / "megatron").tokenizer_path.name == "tokenizer.json"
    assert folder.tokenizer_path(tmp_path / "megatron") == tmp_path / "megatron" / "tokenizer.json"
    for name in [*files, "chat_template.jinja", "config.json"]:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("case", ["llama32_tied", "opt", "qwen3_moe_partly", "deepseek_v3"])
def test_what_megatron_saved_at_another_layout_goes_back(case, tmp_path):
    source = hf_models.build(case, tmp_path / "hf")
    convert(source, tmp_path / "megatron", "megatron", UNVERIFIED)
    run_ranks(2, load_and_save, tmp_path / "megatron", tmp_path / "saved", 1, "fp32")
    convert(tmp_path / "saved", tmp_path / "back", "hf", UNVERIFIED)
    wanted, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    if case == "opt":  # two rows that no position ever uses are not trained, and so not saved
        assert not weights["model.decoder.embed_positions.weight"][:2].any()
        wanted["model.decoder.embed_positions.weight"][:2] = 0
    same(weights, wanted)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(("case", "tp"), [("mixtral", 1), ("qwen2_moe", 2), ("deepseek_v3", 1)])
def test_experts_divided_over_ranks_go_back(case, tp, tmp_path):
    """Each rank holds half of the experts, whole; at tp = 2 it holds half of everything else."""
    source = hf_models.build(case, tmp_path / "hf")
    convert(source, tmp_path / "megatron", "megatron", UNVERIFIED)
    run_ranks(2, load_and_save, tmp_path / "megatron", tmp_path / "saved", 1, "fp32", tp, 2)
    convert(tmp_path / "saved", tmp_path / "back", "hf", UNVERIFIED)
    same(*(load_file(tmp_path / name / "model.safetensors") for name in ("back", "hf")))


def test_a_student_trained_in_bf16_says_so(tmp_path):
    source = hf_models.build("qwen2", tmp_path / "hf")
    convert(source, tmp_path / "megatron", "megatron", UNVERIFIED)
    run_ranks(2, load_and_save, tmp_path / "megatron", tmp_path / "saved", 2, "bf16")
    convert(tmp_path / "saved", tmp_path / "back", "hf", UNVERIFIED)
    same(load_file(tmp_path / "back" / "model.safetensors"),
         {n: t.bfloat16() for n, t in load_file(source / "model.safetensors").items()})  # fmt: skip
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    assert (old.pop("dtype"), new.pop("dtype")) == ("float32", "bfloat16") and old == new


def test_a_model_that_never_was_hf_gets_a_config_that_says_the_same(tmp_path):
    writable = [case for case, (kind, _) in hf_models.CASES.items() if FAMILIES[kind].config]
    assert len(writable) > 15
    for case in writable:
        source = hf_models.build(case, tmp_path / case)
        opened = open_hf(source)
        family, config = config_of(opened.model, opened.family.model_type)
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / "config.json").write_text(json.dumps(config))
        assert model_section(family, tmp_path / "again") == opened.model, case


def test_choosing_a_family(tmp_path):
    small = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
    small |= {"max_sequence_length": 64, "vocab_size": 100}
    assert config_of(Model(**small), None)[0].model_type == "llama"
    assert config_of(Model(**small, qk_norm=True), None)[0].model_type == "qwen3"
    assert config_of(Model(**small, add_qkv_bias=True), None)[0].model_type == "qwen2"
    assert config_of(Model(**small, rotary_percent=0.5), None)[0].model_type == "phi3"  # Llama's ignores the share
    gpt2 = {"normalization": "LayerNorm", "activation": "gelu_tanh", "add_bias_linear": True}
    gpt2 |= {"position_embedding": "learned_absolute"}
    assert config_of(Model(**small, **gpt2), None)[0].model_type == "gpt2"
    with pytest.raises(CheckpointError, match="no Hugging Face architecture computes exactly this model"):
        config_of(Model(**small, activation="reglu", norm_zero_centered=True), None)
    with pytest.raises(CheckpointError, match=r"llama: .*qk_norm True becomes False"):
        config_of(Model(**small, qk_norm=True), "llama")
    with pytest.raises(CheckpointError, match="no family 'lama'"):
        config_of(Model(**small), "lama")


def test_direct_use_converts_once_and_notices_a_change(tmp_path, caplog):
    source = hf_models.build("llama2", tmp_path / "hf")
    with caplog.at_level("INFO", "megakd"):
        made = converted(source)
    assert [record.levelname for record in caplog.records if "converting it once" in record.message] == ["INFO"]
    assert "better converted before the launch: `megakd convert --from" in caplog.text
    caplog.clear()
    assert made.parent == tmp_path and made.name == f"hf.megakd-{content_key(source)}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", made.name], "no lock stays"
    stamp = (made / "megakd.json").stat().st_mtime_ns
    assert "bound" in open_checkpoint(source).conversion["verified"]
    with caplog.at_level("INFO", "megakd"):
        assert find_checkpoint(source) == made
    assert not caplog.records
    assert (made / "megakd.json").stat().st_mtime_ns == stamp
    key = content_key(source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert content_key(source) != key
