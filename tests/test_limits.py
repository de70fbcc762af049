"""Limits by name: what they refuse, and how they are raised."""

import json
import pathlib
import time

import pytest

from megakd.config import Config
from megakd.config.yaml12 import parse_yaml
from megakd.errors import CheckpointError, ConfigError
from megakd.limits import LIMITS, check_limit, limit, parse_json

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "security.md"


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_can_be_raised_and_is_documented(name, monkeypatch):
    default, what = LIMITS[name]
    with pytest.raises(CheckpointError, match=f"file: .* {what} exceed the limit {name} = {default:,}") as caught:
        check_limit(name, default + 1, "file", CheckpointError)
    assert f"MEGAKD_LIMIT_{name}" in caught.value.hint
    check_limit(name, default, "file", CheckpointError)
    monkeypatch.setenv(f"MEGAKD_LIMIT_{name}", str(default + 1))
    check_limit(name, default + 1, "file", CheckpointError)
    assert f"| `{name}` | {default:,} |" in DOCUMENT.read_text("utf-8")


@pytest.mark.parametrize("text", ["", "many", "-1", "0", "1e9"])
def test_a_limit_that_is_no_number_is_an_error(text, monkeypatch):
    monkeypatch.setenv("MEGAKD_LIMIT_LAYERS", text)
    with pytest.raises(ConfigError, match="MEGAKD_LIMIT_LAYERS is"):
        limit("LAYERS")


def test_depth_is_that_of_brackets_outside_of_texts():
    value = {"a": [[{"b": "[" * 500 + '\\"' + "{" * 500}]] * 60}
    assert parse_json(json.dumps(value), "x", CheckpointError) == value
    deep = "[" * 101 + "]" * 101
    with pytest.raises(CheckpointError, match="101 levels of JSON"):
        parse_json(deep, "x", CheckpointError)
    assert parse_json(deep[1:-1], "x", CheckpointError)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "YAML nodes, aliases written out exceed the limit YAML_NODES"),
        (MERGES, "YAML nodes, aliases written out exceed the limit YAML_NODES"),
        ("a: &a [*a]\n", "YAML"),
        ("a: " + "[" * 100_000, "nested too deep|YAML"),
        ("# " + "x" * (1 << 20), "bytes of YAML exceed the limit YAML_BYTES"),
    ],
)
def test_a_run_config_that_grows_is_refused(text, words, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=words):
        Config.load(tmp_path / "run.yaml")
    assert time.process_time() - started < 20


def test_aliases_in_their_place_are_allowed():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {x: 1}, y: *a}\n", "x") == {
        "a": [1, 2], "b": [1, 2], "c": {"x": 1, "y": [1, 2]}
    }  # fmt: skip


def test_layers_and_experts_of_a_config_are_bounded():
    model = {"num_layers": 10**9, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    values = {"student": {"model": model | {"max_sequence_length": 64}}}
    with pytest.raises(ConfigError, match=r"student\.model\.num_layers: 1,000,000,000 layers exceed the limit LAYERS"):
        Config.from_dict(values)
    model |= {"num_layers": 100, "moe": {"num_experts": 10**7, "top_k": 1, "ffn_hidden_size": 8}}
    values = {"student": {"model": model | {"max_sequence_length": 64}}}
    with pytest.raises(ConfigError, match="experts in all layers exceed the limit EXPERTS"):
        Config.from_dict(values)
