"""Digests: every byte that is read was compared, whatever is read of a file and however."""

import io
import os
import random

import pytest
import torch

from megakd import digests
from megakd.digests import CHUNK_BYTES, DamagedFile, DigestingFile, FileDigests, VerifiedFile, digest_file

CONTENT = random.Random(5).randbytes(2 * CHUNK_BYTES + 4711)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def flip(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(CONTENT)])
def test_digests_do_not_depend_on_how_a_file_is_written(tmp_path, size):
    path, content = tmp_path / "file", CONTENT[:size]
    with DigestingFile(path) as file:
        view, steps = memoryview(content), random.Random(size)
        while len(view):
            step = steps.choice([1, 77, 65537, CHUNK_BYTES, 2 * CHUNK_BYTES + 3])
            file.write(view[:step])
            view = view[step:]
        assert file.tell() == size
        file.sync()
    assert path.read_bytes() == content
    assert file.digester.digests() == digest_file(path)
    assert digest_file(path).count == -(-size // CHUNK_BYTES) == len(digest_file(path).chunks) // 32


def test_torch_saves_into_it_and_loads_out_of_it(tmp_path):
    tensor = torch.randn(1_500_000)
    with DigestingFile(tmp_path / "file") as file:
        file.write(b"before")
        torch.save(tensor, file)
    with VerifiedFile(tmp_path / "file", file.digester.digests()) as whole:
        rest = io.BytesIO(whole.read()[6:])
        assert torch.equal(torch.load(rest, weights_only=True), tensor)
    (tmp_path / "alone").write_bytes(rest.getvalue())
    with VerifiedFile(tmp_path / "alone", digest_file(tmp_path / "alone")) as alone:
        assert torch.equal(torch.load(alone, weights_only=True), tensor)


def test_any_read_gives_what_the_file_holds(file):
    steps = random.Random(3)
    with VerifiedFile(file, digest_file(file)) as verified:
        for _ in range(200):
            start = steps.choice([0, CHUNK_BYTES, 2 * CHUNK_BYTES, steps.randrange(len(CONTENT)), len(CONTENT)])
            length = steps.choice([0, 1, 100, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
            assert verified.seek(start) == start
            assert verified.read(length) == CONTENT[start : start + length]
            assert verified.tell() == min(start + length, len(CONTENT))
        assert verified.seek(-4, os.SEEK_END) == len(CONTENT) - 4 and verified.read() == CONTENT[-4:]
        assert verified.read(1) == b""


def test_a_flipped_bit_is_found_by_every_read_that_meets_its_chunk(file):
    known, steps = digest_file(file), random.Random(11)
    for _ in range(40):
        bit = steps.randrange(8 * len(CONTENT))
        flip(file, bit)
        with VerifiedFile(file, known) as verified:
            for number in range(3):
                verified.seek(number * CHUNK_BYTES + steps.randrange(4000))
                if number == bit // 8 // CHUNK_BYTES:
                    words = f"damaged between the bytes {number * CHUNK_BYTES} and"
                    with pytest.raises(DamagedFile, match=words):
                        verified.read(steps.choice([1, 1000, CHUNK_BYTES]))
                    with pytest.raises(DamagedFile, match=words):
                        verified.read(1)  # nothing of it was kept
                else:
                    assert verified.read(64)
        flip(file, bit)


def test_chunks_that_changed_places_are_found(file):
    known = digest_file(file)
    a, b, rest = CONTENT[:CHUNK_BYTES], CONTENT[CHUNK_BYTES : 2 * CHUNK_BYTES], CONTENT[2 * CHUNK_BYTES :]
    file.write_bytes(b + a + rest)
    with VerifiedFile(file, known) as verified, pytest.raises(DamagedFile, match="between the bytes 0 and"):
        verified.read()


def test_sampled_compares_one_in_so_many_and_the_ends(file, monkeypatch):
    monkeypatch.setattr(digests, "CHUNK_BYTES", 1000)
    known = digest_file(file)
    compared = {0, *range(0, known.count, digests.SAMPLED), known.count - 1}
    for number in (0, 1, digests.SAMPLED - 1, digests.SAMPLED, known.count - 2, known.count - 1):
        flip(file, 8 * number * 1000)
        for verify, found in [("always", True), ("sampled", number in compared), ("never", False)]:
            with VerifiedFile(file, known, verify) as verified:
                if found:
                    with pytest.raises(DamagedFile):
                        verified.read()
                else:
                    assert len(verified.read()) == len(CONTENT)
        flip(file, 8 * number * 1000)


@pytest.mark.parametrize("verify", ["always", "never"])
def test_another_length_is_found_at_once(file, verify):
    known = digest_file(file)
    file.write_bytes(CONTENT + b"x")
    with pytest.raises(DamagedFile, match=f"is {len(CONTENT) + 1} bytes long, {len(CONTENT)} bytes were saved"):
        VerifiedFile(file, known, verify)


def test_a_file_that_shrinks_while_it_is_read_is_found(file):
    with VerifiedFile(file, None) as verified:
        os.truncate(file, CHUNK_BYTES + 5)
        with pytest.raises(DamagedFile, match=f"ends at byte {CHUNK_BYTES + 5}"):
            verified.read()


def test_digests_that_do_not_fit_the_length_are_refused():
    with pytest.raises(ValueError, match="have 1 digests, got 64 digits"):
        FileDigests(4711, "00" * 32)
