"""What examples and docs say exists: every example's YAML is a valid config, every key named in docs is a key."""

import re
from pathlib import Path

import pytest

from megakd.config import Config
from megakd.config.keys import iter_keys

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/*.yaml"))
SECTIONS = set(Config.model_fields)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_example_is_a_config(path):
    config = Config.load(path, [])
    assert config.data.sequence_length >= 128


def test_the_tutorials_use_one_data_section():
    """Teacher and student read the same samples, so one index serves both."""
    for tutorial in ("dolly", "openassistant_chat"):
        sft, kd = (Config.load(ROOT / "examples" / tutorial / f"{name}.yaml", []) for name in ("sft", "kd"))
        assert sft.data == kd.data and kd.teacher.checkpoint == sft.run.dir


def test_docs_name_keys_that_exist():
    known = {key.name for key in iter_keys(Config)}
    known |= {name.rpartition(".")[0] for name in known}
    text = (ROOT / "docs" / "from-nemo-aligner.md").read_text(encoding="utf-8")
    named = {match for match in re.findall(r"`([a-z_]+\.[a-z_.]+[a-z_])", text) if match.split(".")[0] in SECTIONS}
    assert len(named) > 40 and not named - known
