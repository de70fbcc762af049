"""`megakd check --env`: what is installed, what is missing, what is there and broken."""

import json
import re

import pytest

from megakd.cli import main
from megakd.megatron_on_cpu.importing import TESTED
from megakd.runs import environment
from tests.test_project import EXTRAS, PROJECT, package


def parts(capsys):
    assert main(["check", "--env", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    return said, {part["name"]: part for part in said["parts"]}


def test_every_dependency_and_every_extra_is_reported_with_its_use():
    known = {one.name: one for one in environment.PACKAGES}
    needed = {package(requirement) for requirement in PROJECT["project"]["dependencies"]}
    extras = {package(r) for name in ("plots", "cuda", "wandb", "eval") for r in EXTRAS[name]}
    assert {name for name, one in known.items() if one.kind == environment.NEEDED} == needed
    assert extras <= known.keys() and known.keys() - needed - extras == {"apex", "nvidia-resiliency-ext"}
    assert all(one.use for one in known.values())
    for name in ("plots", "cuda", "wandb", "eval"):
        extra = f'pip install "megakd[{name}]"'
        assert any(extra in known[package(requirement)].without for requirement in EXTRAS[name]), extra


def test_what_is_here_and_what_is_not(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    said, found = parts(capsys)
    assert found["torch"]["works"] and found["megatron-core"]["note"] == f"tried: {TESTED[0]} to {TESTED[1]}"
    assert found["apex"]["version"] is None and not found["apex"]["works"] and "torch's Adam" in found["apex"]["note"]
    assert "cores" in said["machine"]["machine"] and said["environment"]["NCCL_DEBUG"] == "WARN"
    assert main(["check", "--env"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  transformer-engine +(missing +|\d\S+ +)layers with", text, re.MULTILINE)
    assert "  NCCL_DEBUG=WARN\n" in text and not re.search(r"^.{111}", text.partition("environment that")[0], re.M)


def install(folder, name, module, source, version="9.9"):
    """A distribution with one module."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_what_is_there_and_cannot_be_imported_is_no_success(tmp_path, capsys, monkeypatch):
    broken = "raise ImportError('libfoo.so: undefined symbol: bar\\nand more')"
    install(tmp_path, "transformer-engine", "transformer_engine.pytorch", broken)
    install(tmp_path, "apex", "apex.others", "")
    monkeypatch.syspath_prepend(tmp_path)
    _, found = parts(capsys)
    note = "is there, but cannot be imported: libfoo.so: undefined symbol: bar; without it: Megatron's local layers"
    assert found["transformer-engine"]["version"] == "9.9" and not found["transformer-engine"]["works"]
    assert found["transformer-engine"]["note"].startswith(note)
    assert "the other project of that name?" in found["apex"]["note"]


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0"])
def test_a_megatron_that_nobody_tried_is_named(version):
    assert environment.outside_of_tried("megatron-core", version).endswith("what to look at")


@pytest.mark.parametrize("arguments", [[], ["--env", "folder"], ["--json", "folder"]])
def test_arguments_that_do_not_go_together(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["check", *arguments])
