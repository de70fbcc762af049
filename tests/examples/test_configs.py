"""What examples and docs say exists: every example's YAML is a valid config, every key named in docs is a key."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from megakd.config import Config
from megakd.config.keys import iter_keys
from megakd.config.yaml12 import parse_yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/*.yaml"))
FLAG_TOOLS = {"convert": "convert", "generate": "generate", "prepare": "prepare", "cache": "cache_tools"}
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


def test_readme_shows_a_config():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    Config.from_dict(parse_yaml(text, "README.md"))


def shown_commands() -> list[str]:
    """The command lines of tools with flags that README and the examples' READMEs show, without comments."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md")), ROOT / "docs" / "convert.md"]
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages)
    verbs = "|".join(FLAG_TOOLS)
    found = re.findall(rf"^ {{4,}}(?:\$ )?megakd ((?:{verbs}) .*)$", text, re.MULTILINE)
    return sorted({re.sub(r"\s+#.*", "", line) for line in found})


@pytest.mark.parametrize("command", shown_commands())
def test_shown_commands_have_flags_that_exist(command):
    verb, *arguments = shlex.split(command)
    module = importlib.import_module(f"megakd.runs.{FLAG_TOOLS[verb]}")
    if "--help" not in arguments:
        module.build_parser().parse_args(arguments)


def test_the_first_task_takes_five_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    task = text.partition("## Distil my two Hugging Face models")[2].partition("\n## ")[0]
    lines = [line for line in task.splitlines() if line.startswith("    ")]
    assert len(lines) == 5 and lines[3].split()[0] == "torchrun"
