"""Dotted overrides: values in YAML, sections made where they are absent, mistakes named."""

import pytest

from megakd.config.overrides import apply_overrides
from megakd.errors import ConfigError


def test_values_are_yaml_and_sections_are_made():
    values = {"train": {"steps": 1, "epochs": None}, "teacher": None}
    keys = apply_overrides(
        values,
        ["train.steps=20", "optimizer.lr=3e-4", "a.b.c=false", "data.train=null", "teacher.checkpoint=x=y", "run.dir="],
    )
    assert keys == ["train.steps", "optimizer.lr", "a.b.c", "data.train", "teacher.checkpoint", "run.dir"]
    assert values == {
        "train": {"steps": 20, "epochs": None},
        "optimizer": {"lr": 3e-4},
        "a": {"b": {"c": False}},
        "data": {"train": None},
        "teacher": {"checkpoint": "x=y"},
        "run": {"dir": None},
    }


def test_lists_sections_and_the_last_one_counts():
    values = {"student": {"checkpoint": "c"}}
    apply_overrides(values, ["run.allow_change=[train, run.seed]", "student={model: {num_layers: 2}}", "a=1", "a=2"])
    assert values == {"student": {"model": {"num_layers": 2}}, "run": {"allow_change": ["train", "run.seed"]}, "a": 2}


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "train.=3", ".steps=3", "--help-me"])
def test_what_is_no_override(override):
    with pytest.raises(ConfigError, match="is not an override of the form"):
        apply_overrides({}, [override])


def test_bad_values_and_keys_below_a_value():
    with pytest.raises(ConfigError, match=r"command line, a.b, line 1, column 3: not valid YAML"):
        apply_overrides({}, ["a.b=[1"])
    with pytest.raises(ConfigError, match=r"run.dir.x cannot be set, run.dir is 'runs' and not a section"):
        apply_overrides({"run": {"dir": "runs"}}, ["run.dir.x=1"])
