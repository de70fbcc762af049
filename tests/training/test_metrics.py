"""Where metrics go: what is checked before anything is built, and what Weights & Biases is told."""

import importlib.util
import sys

import pytest

from megakd.config import Config
from megakd.errors import ConfigError
from tests.training import runs

WANDB = """
class Error(Exception):
    pass

def init(**given):
    if given["project"] == "refused":
        raise Error("no API key")
    return given
"""


def config(tmp_path, **log) -> Config:
    return Config.from_dict(runs.values("data", tmp_path, log=log))


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name that says what it is told; the real one wants an account."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield
    sys.modules.pop("wandb", None)


def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it(tmp_path):
    from megakd.training.metrics import check_sinks

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    check_sinks(config(tmp_path))
    with pytest.raises(ConfigError, match=r"log\.wandb_project = 'p', but .*not installed\nhint: .*megakd\[wandb\]"):
        check_sinks(config(tmp_path, wandb_project="p"))


def test_wandb_gets_project_entity_group_and_tags_and_a_run_keeps_its_identity(tmp_path, wandb):
    from megakd.training.metrics import check_sinks, start_wandb

    told = config(tmp_path, wandb_project="p", wandb_entity="e", wandb_group="g", wandb_tags=["a", "b"])
    check_sinks(told)
    first, again = start_wandb(told), start_wandb(told)
    assert {name: first[name] for name in ("project", "entity", "group", "tags")} == {
        "project": "p", "entity": "e", "group": "g", "tags": ["a", "b"],
    }  # fmt: skip
    assert first["id"] == again["id"] and first["resume"] == "allow"
    with pytest.raises(ConfigError, match=r"Weights & Biases refuses: no API key\nhint: `wandb login`"):
        start_wandb(config(tmp_path, wandb_project="refused"))
