"""Scalars mean what YAML 1.2 says, and what is written reads back the same."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.config.yaml12 import format_yaml, parse_yaml
from megakd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("3E+4", 3e4), ("-1e6", -1e6), (".5", 0.5), ("3.", 3.0), ("1.5e-08", 1.5e-8),
        ("20", 20), ("+7", 7), ("-7", -7), ("010", 10), ("0o17", 15), ("0x1F", 31),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("no", "no"), ("off", "off"), ("yes", "yes"), ("on", "on"), ("1:30", "1:30"), ("1_000", "1_000"),
        ("2026-11-21", "2026-11-21"), ("e4", "e4"), ("1e", "1e"), ("'3e-4'", "3e-4"), ("[1, a]", [1, "a"]),
        (".inf", math.inf), ("=", "="),
    ],
)  # fmt: skip
def test_scalars(text, value):
    parsed = parse_yaml(text, "here")
    assert parsed == value and type(parsed) is type(value)


def test_not_a_number():
    assert math.isnan(parse_yaml(".nan", "here"))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False),
    st.text("ab 01.-+eE:#'\"[]{}&*!|>%@`,?~<=\\\n\täß日🙂"),
    st.sampled_from(["no", "3e-4", "010", "null", "1:30", "0x1f", "=", "<<", "~", "true", "2026-11-21", "- a", "a: b"]),
)  # fmt: skip


VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.just("x"), SCALARS))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), VALUES))
def test_round_trip(values):
    assert parse_yaml(format_yaml(values), "here") == values


def test_keys_given_twice_are_refused_at_any_depth_and_merges_are_not():
    with pytest.raises(ConfigError, match=r"here, line 3, column 3: .* key 'b' is given twice"):
        parse_yaml("a:\n  b: 1\n  b: 2\n", "here")
    merged = parse_yaml("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  b: 3\n", "here")
    assert merged["d"] == {"b": 3, "c": 2}
