"""Finished files to an address elsewhere: fsspec's stores of files and memory, one that breaks off, and a bucket."""

import pathlib

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from megakd import upload
from megakd.errors import ConfigError
from megakd.upload import Target

SUFFIX = ".info.json"


class Breaking(LocalFileSystem):
    """Takes the description and half of the file, then loses its connection."""

    protocol = "breaking"

    @classmethod
    def _strip_protocol(cls, path, *_):
        return path.removeprefix("breaking://")

    def put_file(self, local, remote, **_):
        content = pathlib.Path(local).read_bytes()
        with open(remote, "wb") as out:
            out.write(content if SUFFIX in remote else content[: len(content) // 2])
        if SUFFIX not in remote:
            raise ConnectionResetError("the other side went away")


class Bucket(MemoryFileSystem):
    """A store whose buckets must exist and whose puts are whole: a rename is a mistake there."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("bucket://")

    def exists(self, path, **kwargs):
        return path == "there" or super().exists(path, **kwargs)

    def mv(self, *_, **__):
        raise AssertionError("a copy of all bytes")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "here" / "out.jsonl"
    path.parent.mkdir()
    path.write_text('{"a": 1}\n' * 1000)
    path.with_name(path.name + SUFFIX).write_text('{"settings": 1}')
    return path


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_both_files_arrive_once(file, tmp_path):
    there = tmp_path / "there" / "deep"
    target = Target(f"file://{there}/", file, SUFFIX)
    target.check()
    assert target.upload() and not target.upload()
    assert names(there) == ["out.jsonl", "out.jsonl.info.json"]
    assert (there / "out.jsonl").read_bytes() == file.read_bytes()
    file.with_name(file.name + SUFFIX).write_text('{"settings": 2}')
    with pytest.raises(ConfigError, match="another file has this name already"):
        target.upload()
    assert (there / "out.jsonl.info.json").read_text() == '{"settings": 1}'


def test_a_file_that_was_there_is_kept(file, tmp_path):
    (tmp_path / "other.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"other.jsonl: another file has this name already.*\n.*is complete and kept"):
        Target(f"file://{tmp_path}/other.jsonl", file, SUFFIX).upload()
    assert names(tmp_path) == ["other.jsonl", "out.jsonl", "out.jsonl.info.json"]


def test_an_upload_that_breaks_off_can_be_repeated(file, tmp_path):
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    there = tmp_path / "there"
    with pytest.raises(ConfigError, match=r"ConnectionResetError: the other side went away\n.*same command again"):
        Target(f"breaking://{there}/out.jsonl", file, SUFFIX).upload()
    assert names(there) == ["out.jsonl.info.json"], "half of a file is not under its name, nor under another"
    assert Target(f"file://{there}/out.jsonl", file, SUFFIX).upload()
    assert (there / "out.jsonl").read_bytes() == file.read_bytes()


def test_buckets(file, monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(upload, "BUCKETS", {"bucket"})
    with pytest.raises(ConfigError, match="there is no nowhere"):
        Target("bucket://nowhere/out.jsonl", file, SUFFIX).check()
    target = Target("bucket://there/out.jsonl", file, SUFFIX)
    target.check()
    assert target.upload() and not target.upload()
    assert target.store.cat_file("there/out.jsonl") == file.read_bytes()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("out.jsonl", "is no address"),
        ("nosuch://x/y", "nosuch"),
        ("file:///proc/", "/proc/out.jsonl"),
    ],
)
def test_addresses_that_cannot_be(file, address, message):
    with pytest.raises(ConfigError, match=message) as refused:
        target = Target(address, file, SUFFIX)
        target.check()
        target.upload()
    assert "hint" in str(refused.value)
