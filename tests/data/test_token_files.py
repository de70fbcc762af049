"""Token files: equal to Megatron's own, whole or absent, and every kind of damage refused by name."""

import dataclasses
import errno
import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megakd.data.token_files.layout import load_info, part, write_info
from megakd.data.token_files.reader import TokenFile
from megakd.data.token_files.verification import chunks_to_compare, compare, size_of
from megakd.data.token_files.writer import TokenFileWriter
from megakd.digests import KIND, sealed
from megakd.errors import DataError

DOCUMENTS = [[5, 6, 7, 2], [2], [9, 9, 2], list(range(3, 31)), [8, 2]]


def write(prefix, documents=DOCUMENTS, vocab_size=97, fingerprint="aa" * 32):
    with TokenFileWriter(prefix, tokenizer_fingerprint=fingerprint, vocab_size=vocab_size, eos_appended=True) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def masked_writer(prefix):
    return TokenFileWriter(prefix, tokenizer_fingerprint="aa" * 32, vocab_size=97, eos_appended=False, masked=True)


def writer(prefix):
    return TokenFileWriter(prefix, tokenizer_fingerprint="aa" * 32, vocab_size=97, eos_appended=False)


def test_the_bytes_are_the_documented_ones(tmp_path):
    write(tmp_path / "x", [[5, 6, 2], [7, 2]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<5H", 5, 6, 2, 7, 2)
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 2, 0, 6, 0, 1, 2)
    )
    info = json.loads((tmp_path / "x.json").read_text())
    assert info.pop("digest") == sealed(info)["digest"] and info.pop("digests") == KIND
    digests = {
        suffix: xxhash.xxh3_128_hexdigest(part(tmp_path / "x", suffix).read_bytes()) for suffix in (".bin", ".idx")
    }
    assert info.pop("parts") == {
        ".bin": {"bytes": 10, "digests": digests[".bin"]}, ".idx": {"bytes": 82, "digests": digests[".idx"]},
    }  # fmt: skip
    assert info.pop("content") and info == {
        "tokenizer_fingerprint": "aa" * 32, "vocab_size": 97, "documents": 2, "tokens": 5, "eos_appended": True,
        "masked": False, "supervised": 5, "made_from": None, "skipped": 0, "format": 2,
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
        assert file.index.dtype == sizes[size]


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
            monkeypatch.setattr(os, "fsync", full)
        writer.add([1, 2, 3])
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "file" / "x")


def cut(path, bytes_kept):
    path.write_bytes(path.read_bytes()[:bytes_kept])


def without_digests(prefix):
    """As the description of an older megakd."""
    write_info(part(prefix, ".json"), dataclasses.replace(load_info(prefix), parts=None, format=1))
    return prefix


DAMAGES = [
    (
        lambda p: cut(part(p, ".bin"), -1),
        r"x\.bin .*has 75 bytes, .*places tokens up to byte 76",
        "has 75 bytes, 76 were",
    ),
    (lambda p: cut(part(p, ".bin"), 0), r"x\.bin .*has 0 bytes", "has 0 bytes, 76 were"),
    (lambda p: cut(part(p, ".idx"), -1), r"x\.idx .*has \d+ bytes, 5 documents need", "has 141 bytes, 142 were"),
    (lambda p: cut(part(p, ".idx"), 20), r"x\.idx .*has 20 bytes, its header alone needs 34", "has 20 bytes, 142 were"),
    (lambda p: cut(part(p, ".idx"), 0), r"x\.idx .*has 0 bytes", "has 0 bytes, 142 were"),
    (lambda p: cut(part(p, ".json"), 30), r"x\.json cannot be read", r"x\.json cannot be read"),
    (lambda p: part(p, ".bin").unlink(), r"x\.bin cannot be read.*No such file", r"x\.bin .*is missing"),
    (lambda p: part(p, ".idx").unlink(), r"x\.idx cannot be read.*No such file", r"x\.idx .*is missing"),
    (lambda p: part(p, ".json").unlink(), r"x\.json does not exist", r"x\.json does not exist"),
    (lambda p: part(p, ".idx").write_bytes(b"X" * 142), "no Megatron index", "no Megatron index"),
]


@pytest.mark.parametrize(("damage", "complaint", "with_digests"), DAMAGES)
def test_damage_is_named(tmp_path, damage, complaint, with_digests):
    (tmp_path / "old").mkdir()
    for prefix, expected in ((write(tmp_path / "x"), with_digests), (write(tmp_path / "old" / "x"), complaint)):
        if expected is complaint:
            without_digests(prefix)
        damage(prefix)
        with pytest.raises(DataError, match=expected):
            TokenFile(prefix)


def compared(prefix, **options):
    compare(chunks_to_compare([TokenFile(prefix)], "always", **options))


def test_a_set_mixed_of_two_is_named(tmp_path):
    """Parts of two preparations side by side, of the same sizes or not, as copying one over the other leaves them."""
    for other, documents in (("other", [[1] * len(d) for d in DOCUMENTS]), ("smaller", [[1, 2]])):
        theirs = write(tmp_path / other, documents)
        for count in (1, 2):
            for suffixes in itertools.combinations((".bin", ".idx", ".json"), count):
                prefix = write(tmp_path / "x")
                for suffix in suffixes:
                    part(prefix, suffix).write_bytes(part(theirs, suffix).read_bytes())
                if other == "other" and suffixes in ((".idx",), (".bin", ".json")):
                    compared(prefix)  # documents of the same lengths have the same .idx: the set is whole
                    continue
                with pytest.raises(DataError, match=r"x\.(bin|idx) is damaged: .*\n.*of another preparation"):
                    compared(prefix)


def test_what_was_written_is_found_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("megakd.digests.CHUNK_BYTES", 16)
    monkeypatch.setattr("megakd.data.token_files.verification.CHUNK_BYTES", 16)
    prefix = write(tmp_path / "x", DOCUMENTS * 30)  # 2,280 bytes of tokens
    file = TokenFile(prefix)
    every = chunks_to_compare([file], "always")
    assert len(every) == -(-2280 // 16) + -(-part(prefix, ".idx").stat().st_size // 16)
    assert sum(map(size_of, every)) == 2280 + part(prefix, ".idx").stat().st_size
    compare(every)
    shares = [chunks_to_compare([file], "always", share, 3) for share in range(3)]
    assert sorted(map(repr, itertools.chain(*shares))) == sorted(map(repr, every)) and len({*map(len, shares)}) <= 2
    sampled = chunks_to_compare([file], "sampled")
    assert [number for part_, _, number in sampled if part_ is file.files[".bin"]] == [*range(0, 143, 16), 142]
    assert chunks_to_compare([file], "never") == [] == chunks_to_compare([TokenFile(without_digests(prefix))], "always")


def test_no_bit_of_any_file_flips_unseen(tmp_path):
    prefix = tmp_path / "x"
    with masked_writer(prefix) as file:
        for document in DOCUMENTS:
            file.add(document, np.arange(len(document)) % 2 == 0)
    compared(prefix)
    for suffix in (".bin", ".idx", ".mask", ".json"):
        content = part(prefix, suffix).read_bytes()
        for bit in range(0, 8 * len(content), 5 if suffix != ".json" else 19):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            part(prefix, suffix).write_bytes(flipped)
            try:
                compared(prefix)
            except DataError as error:
                assert "x." in str(error)
            else:
                assert suffix == ".json" and json.loads(flipped) == json.loads(content)  # white space, a capital E
            part(prefix, suffix).write_bytes(content)


def test_what_shrinks_under_a_reader_is_an_error(tmp_path):
    """A mapped file would end the process with SIGBUS."""
    prefix = write(tmp_path / "x", [[7] * 40_000, [8] * 40_000])
    file = TokenFile(prefix)
    os.truncate(part(prefix, ".bin"), 100)
    assert file.read_tokens(3, 40).tolist() == [7] * 40
    with pytest.raises(DataError, match=r"x\.bin is damaged: it has 100 bytes now, 160,000 were written"):
        file.document(1)
    with masked_writer(prefix) as writer:
        writer.add([7] * 40_000, [True] * 40_000)
    file = TokenFile(prefix)
    os.truncate(part(prefix, ".mask"), 100)
    with pytest.raises(DataError, match=r"x\.mask is damaged: it has 100 bytes now, 40,004 were written"):
        file.read_mask(5, 2000)


def test_another_tokenizer_is_refused(tmp_path):
    prefix = write(tmp_path / "x")
    TokenFile(prefix, "aa" * 32)
    with pytest.raises(DataError, match=r"written with tokenizer aaaaaaaaaaaa\.\.\., this run uses bbbbbbbbbbbb"):
        TokenFile(prefix, "bb" * 32)


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
