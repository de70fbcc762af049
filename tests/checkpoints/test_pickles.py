"""The one reader of pickles: what it takes, what it refuses, and that nothing else reads them."""

import argparse
import ast
import copy
import io
import pathlib
import pickle
import zipfile

import pytest
import torch

from megakd.checkpoints import metadata_pickle, pickles
from megakd.checkpoints.pickles import load_file
from megakd.errors import CheckpointError
from tests.checkpoints.planted import Plant


def load_values(path):
    with open(path, "rb", buffering=0) as file:
        return pickles.load_values(file, path)


def load_metadata(path):
    with open(path, "rb", buffering=0) as file:
        return metadata_pickle.load_metadata(file, path)


PACKAGE = pathlib.Path(__file__).parents[2] / "megakd"


@pytest.fixture
def saved(tmp_path):
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.nn.Parameter(torch.randn(2))}
    tensors["d"] = tensors["a"].t()
    torch.save(tensors, tmp_path / "new.bin")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    return tensors


@pytest.mark.parametrize("name", ["new.bin", "old.bin"])
def test_tensors_of_both_formats_are_read(saved, name, tmp_path):
    loaded = load_file(tmp_path / name)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_plain_values_are_read_and_parts_of_files_too(tmp_path, monkeypatch):
    values = {"step": 3, "betas": (0.9, 0.95), "state": [torch.arange(5, dtype=torch.uint8)], "none": None}
    torch.save(values, tmp_path / "values.pt")
    assert load_values(tmp_path / "values.pt")["betas"] == (0.9, 0.95)
    with open(tmp_path / "file", "wb") as file:
        file.write(b"something before" + (tmp_path / "values.pt").read_bytes() + b"something after")
    length = (tmp_path / "values.pt").stat().st_size
    for most in (length, length - 1):
        monkeypatch.setattr(pickles, "IN_MEMORY_BYTES", most)
        with open(tmp_path / "file", "rb", buffering=0) as file:
            assert pickles.load_window(file, 16, length, "a part")["step"] == 3
            with pytest.raises(CheckpointError, match="a part cannot be read"):
                pickles.load_window(file, 15, length, "a part")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("load", [load_file, load_values])
def test_what_runs_code_is_refused_by_name(load, new, tmp_path):
    torch.save({"a": torch.ones(2), "b": Plant(tmp_path / "ran")}, tmp_path / "x", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"x refers to posix\.system, which no checkpoint needs"):
        load(tmp_path / "x")
    assert not (tmp_path / "ran").exists()


def test_the_list_is_ours_whatever_else_torch_was_told_to_trust(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "x")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(tmp_path / "x", weights_only=True)
        with pytest.raises(CheckpointError, match=r"refers to argparse\.Namespace"):
            load_values(tmp_path / "x")


def test_pickles_that_hide_names_are_refused(tmp_path):
    torch.save({"b": Plant(tmp_path / "ran")}, tmp_path / "x", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="pickle operation STACK_GLOBAL"):
        load_values(tmp_path / "x")
    assert not (tmp_path / "ran").exists()


HIDING = {
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(No.",
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\x00.",
    "EXT4": b"\x84\x01\x00\x00\x00.",
    "NEXT_BUFFER": b"\x97.",
}


@pytest.mark.parametrize("operation", HIDING)
def test_no_other_operation_names_anything(operation, tmp_path):
    (tmp_path / "x").write_bytes(HIDING[operation])
    with pytest.raises(CheckpointError, match=f"pickle operation {operation}, which"):
        load_values(tmp_path / "x")


def test_names_on_the_list():
    good = [("torch", "FloatStorage"), ("torch.cuda", "HalfStorage"), ("torch", "bfloat16"), ("torch", "Size")]
    bad = [
        ("torch", "load"),
        ("os", "FloatStorage"),
        ("torch", "serialization.os.systemStorage"),
        ("posix", "bfloat16"),
    ]
    assert all(pickles.is_saved_name(*name) for name in good) and not any(pickles.is_saved_name(*name) for name in bad)


def test_every_pickle_of_an_archive_is_looked_at(tmp_path):
    """torch reads the one in the folder of the first member, wherever it stands."""
    torch.save({"a": torch.ones(2)}, tmp_path / "good")
    torch.save({"a": Plant(tmp_path / "ran")}, tmp_path / "bad")
    with (
        zipfile.ZipFile(tmp_path / "bad") as bad,
        zipfile.ZipFile(tmp_path / "good") as good,
        zipfile.ZipFile(tmp_path / "x", "w") as both,
    ):
        both.writestr("bad/version", bad.read("bad/version"))
        both.writestr("good/data.pkl", good.read("good/data.pkl"))
        for name in bad.namelist():
            if name != "bad/version":
                both.writestr(name, bad.read(name))
    with pytest.raises(CheckpointError, match=r"refers to posix\.system"):
        load_values(tmp_path / "x")


@pytest.mark.parametrize("name", ["ARCHIVE_MEMBERS", "PICKLE_BYTES"])
def test_limits_of_an_archive(name, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "x")
    monkeypatch.setenv(f"MEGAKD_LIMIT_{name}", "3")
    for load in (load_file, load_values):
        with pytest.raises(CheckpointError, match=f"exceed the limit {name} = 3"):
            load(tmp_path / "x")
    if name == "PICKLE_BYTES":
        (tmp_path / "x").write_bytes(pickle.dumps({}))
        with pytest.raises(CheckpointError, match=f"exceed the limit {name} = 3"):
            load_metadata(tmp_path / "x")


def rewritten(source, target, edit=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))


def test_an_archive_that_grows_is_refused(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "x")
    rewritten(tmp_path / "x", tmp_path / "small", compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "small").stat().st_size < 5_000
    with pytest.raises(CheckpointError, match="compressed or larger inside than outside"):
        load_file(tmp_path / "small")
    with zipfile.ZipFile(tmp_path / "x", "a") as again:  # members that share their bytes
        large = max(again.filelist, key=lambda member: member.file_size)
        for number in range(2):
            member = copy.copy(large)
            member.filename = f"x/data/again{number}"
            again.filelist.append(member)
        again.writestr("x/small", b"")  # so that the directory is written anew
    with pytest.raises(CheckpointError, match="compressed or larger inside than outside"):
        load_file(tmp_path / "x")


def test_a_tensor_larger_than_what_was_stored_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"a tensor of \[1000000000000\] repeats 4 bytes"):
        load_file(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(1000)])
def test_damage_is_an_error_with_a_hint(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    for load in (load_file, load_values, load_metadata):
        if load is load_metadata and content.endswith(b"."):
            continue  # a dictionary, which TorchDistReader then finds to be no description
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "x")
        assert caught.value.hint and "weights_only" not in str(caught.value)


def test_a_description_cannot_change_a_class(tmp_path):
    """The operation BUILD sets attributes of whatever it is given, classes too; it is not given the real ones."""
    from torch.distributed.checkpoint.metadata import Metadata

    opcodes = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(N}\x8c\x06poison\x8c\x04evils\x86b."
    pickle.Unpickler(io.BytesIO(opcodes.replace(b"(N", b"N"))).load()
    assert Metadata.poison == "evil", "the exploit is wrong"
    del Metadata.poison
    (tmp_path / "x").write_bytes(opcodes.replace(b"(N", b"N"))
    with pytest.raises(CheckpointError):
        load_metadata(tmp_path / "x")
    assert not hasattr(Metadata, "poison")


READERS = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("marshal", "loads")}
READERS |= {
    ("dist_checkpointing", name) for name in ("load_common_state_dict", "load_plain_tensors", "load_content_metadata")
}
HOME = "checkpoints/pickles.py"
HOMES = {HOME: READERS, "checkpoints/metadata_pickle.py": {("pickle", "Unpickler")}}


def calls(source: str):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch", "marshal", "cloudpickle", "dill"):
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "numpy", "allow_pickle"


def test_nothing_else_reads_pickles():
    forbidden = READERS | {("numpy", "allow_pickle"), ("dist_checkpointing", "load")}
    for path in sorted(PACKAGE.rglob("*.py")):
        found = forbidden & set(calls(path.read_text("utf-8")))
        assert found <= HOMES.get(str(path.relative_to(PACKAGE)), set()), f"{path}: {found}"
    (load,) = [node for node in ast.walk(ast.parse((PACKAGE / HOME).read_text("utf-8")))
               if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]  # fmt: skip
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in load.keywords]
