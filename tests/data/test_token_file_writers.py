"""Who writes token files meets readers, other writers, kills and power cuts: the old set or the new one."""

import contextlib
import errno
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from megakd.data.token_files import reader
from megakd.data.token_files.layout import is_prefix, part
from megakd.data.token_files.reader import TokenFile
from megakd.data.token_files.verification import chunks_to_compare, compare
from megakd.data.token_files.writer import TokenFileWriter
from megakd.errors import DataError
from tests import file_operations
from tests.data.test_token_files import DOCUMENTS, write, writer

OTHER = [[3, 2], [4, 5, 6, 2]]


@pytest.mark.parametrize(
    ("before", "after"), [("nothing", "samples"), ("text", "text"), ("text", "samples"), ("samples", "text")]
)
def test_a_power_cut_leaves_the_old_or_the_new_set(tmp_path, monkeypatch, before, after):
    """After every recorded file operation; what was not synced is lost, torn or zeros. Then it can be written anew."""
    root = tmp_path / "disk"
    root.mkdir()
    written = {"nothing": {}, "text": {"masked": False}, "samples": {"masked": True}}
    if before != "nothing":
        write_either(root / "x", DOCUMENTS, **written[before])
    known = [None if before == "nothing" else contents_of(root / "x")]
    with file_operations.recorded(root, tmp_path / "log"):
        write_either(root / "x", OTHER, **written[after])
    known.append(contents_of(root / "x"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what follows is not recorded
    seen = set()
    for where, disk in file_operations.crash_states(tmp_path / "log", tmp_path / "crashed"):
        found = contents_of(disk / "x")
        assert found in known, where
        seen.add(known.index(found))
        with contextlib.suppress(ValueError), writer(disk / "x") as file:
            file.add([1])
            raise ValueError  # a writer that comes to nothing
        assert contents_of(disk / "x") == found, where
        write_either(disk / "x", [[1, 2]], masked=False)
        names = {".bin", ".idx", ".json"}
        assert {path.name for path in disk.iterdir()} == {f"x{suffix}" for suffix in names}, where
    assert seen == {0, 1}
    for _, disk in file_operations.crash_states(tmp_path / "log", tmp_path / "returned", at_the_end=True):
        assert contents_of(disk / "x") == known[1]


def write_either(prefix, documents, masked, fingerprint="aa" * 32, vocab_size=97):
    with TokenFileWriter(
        prefix, tokenizer_fingerprint=fingerprint, vocab_size=vocab_size, eos_appended=False, masked=masked
    ) as file:
        for document in documents:
            file.add(document, np.arange(len(document)) % 2 == 0)


def contents_of(prefix):
    """All that a reader finds, None for nothing; raises where it is not whole."""
    if not is_prefix(prefix) or not part(prefix, ".json").exists():
        return None
    file = TokenFile(prefix)
    compare(chunks_to_compare([file], "always"))
    mask = file.read_mask(0, file.info.tokens).tolist() if file.info.masked else None
    return [file.document(number).tolist() for number in range(len(file))], mask


@pytest.mark.parametrize("other", [[[n + 1 for n in document] for document in OTHER], DOCUMENTS])
@pytest.mark.parametrize("masked", [False, True])
def test_readers_meet_a_writer(tmp_path, monkeypatch, other, masked):
    """Another set, of the same sizes or not, is published before each thing that a reader does to open one."""
    moments = {}
    for moment in itertools.count():
        prefix, calls = tmp_path / f"{moment}", itertools.count()
        write_either(prefix, OTHER, masked)

        def meet(real, moment=moment, prefix=prefix, calls=calls):
            def call(*arguments):
                if next(calls) == moment:
                    write_either(prefix, other, not masked)
                    moments[moment] = real
                return real(*arguments)

            return call

        with monkeypatch.context() as patched:
            for name in ("load_info", "File"):
                patched.setattr(reader, name, meet(getattr(reader, name)))
            found = contents_of(prefix)[0]
        assert found == (other if moment in moments else OTHER)
        if moment not in moments:
            break
    assert len(moments) >= 6


def test_one_writer_at_a_time(tmp_path):
    """Two at once would publish the tokens of one under the index of the other."""
    with writer(tmp_path / "x") as first:
        first.add([1, 2])
        with (
            pytest.raises(DataError, match=rf"x is being written by .* pid {os.getpid()} "),
            writer(tmp_path / "x"),
        ):
            pass
        write(tmp_path / "x.y")  # another prefix
        assert len(list(tmp_path.glob("x.bin.*.incomplete"))) == 1
    assert TokenFile(tmp_path / "x").document(0).tolist() == [1, 2]
    write(tmp_path / "x")
    assert not list(tmp_path.glob("*.lock*")) and not list(tmp_path.glob("*incomplete"))


ROOT = str(pathlib.Path(__file__).parents[2])


KILLED = """
import os, signal, sys
from megakd.data.token_files.writer import TokenFileWriter
with TokenFileWriter(sys.argv[1], tokenizer_fingerprint="aa", vocab_size=97, eos_appended=False) as file:
    file.add([1, 2])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "x"], env={**os.environ, "PYTHONPATH": ROOT}, check=False)
    assert (tmp_path / "x.lock").exists()
    (tmp_path / "x.y.bin.00000000.incomplete").write_text("another prefix's")
    assert list(tmp_path.glob("x.bin.*.incomplete"))
    write(tmp_path / "x")
    assert not list(tmp_path.glob("x.bin.*.incomplete")) and list(tmp_path.glob("x.y.bin.*"))


def test_writers_at_once_without_locks(tmp_path, monkeypatch):
    """As on file systems that have none: who comes last owns the files, and the other publishes nothing."""

    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("megakd.ownership.fcntl.flock", no_locks)
    with pytest.raises(DataError, match="taken by another launch"), writer(tmp_path / "x") as first:
        first.add([1, 2])
        with monkeypatch.context() as other:
            other.setattr("megakd.ownership.name", lambda: "another process")
            write(tmp_path / "x", [[3]])
            part(tmp_path / "x", ".lock").write_text("another process")
    assert TokenFile(tmp_path / "x").document(0).tolist() == [3]
    assert not list(tmp_path.glob("*incomplete"))
