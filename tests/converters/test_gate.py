"""The gate refuses what is wrong: each deliberate mistake is one that a converter has made."""

import dataclasses

import pytest

from megakd.checkpoints import folder
from megakd.converters.huggingface.importing import import_hf, open_hf
from tests.converters import hf_models
from tests.converters.gpt_ranks import gate
from tests.ranks import run_ranks


def swapped(rule):
    """Reads gate for up and up for gate."""
    return dataclasses.replace(rule, to_ours=lambda t: rule.to_ours(t[::-1]))


def not_interleaved(rule):
    """All queries, then all keys, then all values, as they come."""
    import torch

    return dataclasses.replace(rule, to_ours=lambda t: (torch.cat(t),))


TENSOR_MISTAKES = {  # name -> (case, part of our name, what is done to its rule)
    "gate and up swapped": ("llama31", "linear_fc1.weight", swapped),
    "queries not grouped": ("llama31", "linear_qkv.weight", not_interleaved),
    "q/k/v biases not grouped": ("qwen2", "linear_qkv.bias", not_interleaved),
}
CONFIG_MISTAKES = {  # name -> (case, changed fields of the model section)
    "eps ten times smaller": ("llama2", {"norm_epsilon": 1e-6}),
    "llama3 rope scaling dropped": ("llama31_odd", {"rope_scaling": None}),
    "linear rope scaling dropped": ("llama_linear", {"rope_scaling": None}),
    "rotary base": ("llama3", {"rotary_base": 10000.0}),
    "erf for tanh gelu": ("gpt2", {"activation": "gelu"}),
    "tanh for erf gelu": ("gpt_neox", {"activation": "gelu_tanh"}),
    "window dropped": ("mistral_window", {"sliding_window": None}),
    "window one token too long": ("mistral_window", {"sliding_window": 9}),
    "window in the wrong layers": ("qwen2_window", {"sliding_window_layers": [0, 2]}),
    "rope in a layer without": ("smollm3", {"no_rope_layers": []}),
    "whole head rotated": ("stablelm", {"rotary_percent": 1.0}),
    "sequential residual": ("gpt_neox_parallel", {"parallel_residual": False}),
    "gain for gain - 1": ("nemotron", {"norm_zero_centered": False}),
}


def compare(tmp_path, case, *, part="", change=lambda rule: rule, fields=None):
    opened = open_hf(hf_models.build(case, tmp_path / "hf"))
    rules = {k: change(r) if part and r.ours[0].endswith(part) else r for k, r in opened.rules.items()}
    unique = {id(opened.rules[k]): r for k, r in rules.items()}  # a rule stands under each of its names
    opened = dataclasses.replace(opened, rules={k: unique[id(opened.rules[k])] for k in rules})
    target = folder.begin(tmp_path / "megatron")
    import_hf(opened, target)
    model = opened.model.model_copy(update=fields or {})
    return run_ranks(1, gate, tmp_path / "hf", target, model)[0]


@pytest.mark.parametrize("mistake", TENSOR_MISTAKES)
def test_misplaced_weights_fail(mistake, tmp_path):
    case, part, change = TENSOR_MISTAKES[mistake]
    found = compare(tmp_path, case, part=part, change=change)
    assert not found["passed"] and max(found["differences"]) > 5e-4
    assert "FAIL" in found["report"] and "first layer above" in found["report"]


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_misread_config_fails(mistake, tmp_path):
    case, fields = CONFIG_MISTAKES[mistake]
    found = compare(tmp_path, case, fields=fields)
    assert not found["passed"] and max(found["differences"]) > 5e-4, found["report"]


def test_deep_models_are_judged_by_layer_and_by_transformers_own_rounding(tmp_path):
    source = hf_models.build("llama31", tmp_path / "hf", num_hidden_layers=10)
    opened = open_hf(source)
    target = folder.begin(tmp_path / "megatron")
    import_hf(opened, target)
    (found,) = run_ranks(1, gate, source, target, opened.model)
    assert found["passed"], found["report"]
    assert found["own_difference"] > 0 and 1e-4 <= found["bound"] <= 1e-3
    assert len(found["layers"]) == 10 and max(found["layers"]) < 1e-5
    (found,) = run_ranks(1, gate, source, target, opened.model.model_copy(update={"norm_epsilon": 3e-5}))
    assert not found["passed"]
