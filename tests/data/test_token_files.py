"""Token files: equal to Megatron's own, whole or absent, and every kind of damage refused by name."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megakd.data.token_files.layout import part
from megakd.data.token_files.reader import TokenFile
from megakd.data.token_files.writer import TokenFileWriter
from megakd.errors import DataError

DOCUMENTS = [[5, 6, 7, 2], [2], [9, 9, 2], list(range(3, 31)), [8, 2]]


def write(prefix, documents=DOCUMENTS, vocab_size=97, fingerprint="aa" * 32):
    with TokenFileWriter(prefix, tokenizer_fingerprint=fingerprint, vocab_size=vocab_size, eos_appended=True) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def test_the_bytes_are_the_documented_ones(tmp_path):
    write(tmp_path / "x", [[5, 6, 2], [7, 2]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<5H", 5, 6, 2, 7, 2)
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 2, 0, 6, 0, 1, 2)
    )
    info = json.loads((tmp_path / "x.json").read_text())
    assert info.pop("content") and info == {
        "tokenizer_fingerprint": "aa" * 32, "vocab_size": 97, "documents": 2, "tokens": 5, "eos_appended": True,
        "masked": False, "supervised": 5, "made_from": None, "skipped": 0, "format": 1,
    }  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 3


MEGATRON = """
import json, sys
from megakd import megatron_on_cpu
megatron_on_cpu.install("cpu")
import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
for vocab_size, documents in json.loads(sys.argv[1]):
    theirs, ours = f"theirs{vocab_size}", f"ours{vocab_size}"
    builder = IndexedDatasetBuilder(theirs + ".bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(theirs + ".idx")
    read = IndexedDataset(ours)
    assert [row.tolist() for row in read[0 : len(read)]] == documents
"""


def test_megatron_and_megakd_read_each_others_files(tmp_path):
    """In a process of its own: Megatron writes and reads, then the files are compared byte by byte."""
    sizes = {65499: np.uint16, 65500: np.int32, 200_000: np.int32}
    cases = [(size, [*DOCUMENTS, [size - 1, 2]]) for size in sizes]
    for size, documents in cases:
        write(tmp_path / f"ours{size}", documents, size)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", MEGATRON, json.dumps(cases)], cwd=tmp_path, env=environment, check=True)
    for size, documents in cases:
        ours, theirs = tmp_path / f"ours{size}", tmp_path / f"theirs{size}"
        for suffix in (".bin", ".idx"):
            assert part(ours, suffix).read_bytes() == part(theirs, suffix).read_bytes()
        part(theirs, ".json").write_bytes(part(ours, ".json").read_bytes())
        file = TokenFile(theirs)
        assert [file.document(number).tolist() for number in range(len(file))] == documents
        assert file.tokens.dtype == sizes[size]


@pytest.mark.parametrize("ids", [[], [-1], [97], [3, 97]])
def test_ids_outside_the_vocabulary_are_never_written(tmp_path, ids):
    with pytest.raises(ValueError, match=r"\[0, 97\)"):
        write(tmp_path / "x", [[1], ids])
    assert not list(tmp_path.iterdir())


def test_no_document_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no document"):
        write(tmp_path / "x", [])
    assert not list(tmp_path.iterdir())


def test_a_failed_rewrite_keeps_the_old_file(tmp_path):
    write(tmp_path / "x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError):
        write(tmp_path / "x", [[1, 2], [97]])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_publishes_nothing(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = TokenFileWriter(tmp_path / "x", tokenizer_fingerprint="aa", vocab_size=97, eos_appended=True)
    with pytest.raises(DataError, match="is full"), writer:
        if call == "write":
            real = writer._bin
            monkeypatch.setattr(writer, "_bin", type("Full", (), {"write": full, "close": lambda self: real.close()})())
        else:
            monkeypatch.setattr("megakd.data.token_files.layout.os.fsync", full)
        writer.add([1, 2, 3])
    assert not list(tmp_path.iterdir())


def test_a_crash_between_renames_leaves_no_description(tmp_path, monkeypatch):
    """PREFIX.json goes first and comes last, so a mixture of old and new is never taken for a whole file."""
    write(tmp_path / "x")
    real = type(tmp_path).replace

    def stop_at_index(self, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", stop_at_index)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", [[1, 2]])
    with pytest.raises(DataError, match=r"x\.json does not exist \(only \.bin and \.idx: it was not finished"):
        TokenFile(tmp_path / "x")


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "file" / "x")


def cut(path, bytes_kept):
    path.write_bytes(path.read_bytes()[:bytes_kept])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda p: cut(part(p, ".bin"), -1), r"x\.bin has 75 bytes, .*places tokens up to byte 76"),
        (lambda p: cut(part(p, ".bin"), 0), r"x\.bin has 0 bytes"),
        (lambda p: cut(part(p, ".idx"), -1), r"x\.idx has \d+ bytes, 5 documents need"),
        (lambda p: cut(part(p, ".idx"), 20), r"x\.idx has 20 bytes, its header alone needs 34"),
        (lambda p: cut(part(p, ".idx"), 0), "cannot be read"),
        (lambda p: cut(part(p, ".json"), 30), r"x\.json cannot be read"),
        (lambda p: part(p, ".bin").unlink(), "cannot be read.*No such file"),
        (lambda p: part(p, ".idx").unlink(), "cannot be read.*No such file"),
        (lambda p: part(p, ".json").unlink(), r"x\.json does not exist"),
        (lambda p: part(p, ".idx").write_bytes(b"X" * 999), "no Megatron index"),
        (lambda p: write(p.with_name("y"), [[1, 2]]).with_name("y.json").replace(part(p, ".json")), "describes 1 doc"),
    ],
)
def test_damage_is_named(tmp_path, damage, complaint):
    prefix = write(tmp_path / "x")
    damage(prefix)
    with pytest.raises(DataError, match=complaint):
        TokenFile(prefix)


def test_another_tokenizer_is_refused(tmp_path):
    prefix = write(tmp_path / "x")
    TokenFile(prefix, "aa" * 32)
    with pytest.raises(DataError, match=r"written with tokenizer aaaaaaaaaaaa\.\.\., this run uses bbbbbbbbbbbb"):
        TokenFile(prefix, "bb" * 32)


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


ROOT = str(Path(__file__).parents[2])
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


def writer(prefix):
    return TokenFileWriter(prefix, tokenizer_fingerprint="aa" * 32, vocab_size=97, eos_appended=False)


def test_a_document_in_parts(tmp_path):
    with writer(tmp_path / "x") as file:
        file.add_many([1, 2, 3], [1, 2])
        file.add_many([4], [1], continues=True)
        file.add_many([5, 6, 7], [2, 1], continues=True)
        with pytest.raises(DataError, match=r"document 3 of .* has more than 2,147,483,647 tokens"):
            file._continue(2**31 - 1)
    read = TokenFile(tmp_path / "x")
    assert [read.document(n).tolist() for n in range(len(read))] == [[1], [2, 3, 4, 5, 6], [7]]
    assert (read.info.documents, read.info.tokens) == (3, 7)
