"""No byte of a cache can change unnoticed, and nothing but a CacheError comes of it."""

import dataclasses
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megakd.cache import CacheReader, read_header
from megakd.cache.header import digest_of, write_header
from megakd.cache.shard import check_file
from megakd.errors import CacheError
from megakd.targets import sample_key
from tests.cache.made import make_cache, make_sample

SAMPLES = range(4)
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_cache(folder, SAMPLES, per_part=2)
    return folder


def read_everything(folder):
    reader = CacheReader(folder)
    for number in SAMPLES:
        ids, mask_S, last_label = make_sample(number)
        if reader.table(sample_key(ids), mask_S, last_label) is None:
            raise CacheError(f"sample {number} is gone")


def flipped(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def positions(folder, place):
    """Byte positions of one class of the first shard, or of another file."""
    if not place.startswith("shard"):
        return range((folder / place).stat().st_size)
    record = read_header(folder).shards[0]
    tail = record.bytes - record.foot_bytes
    parts = {"head": (0, record.head_bytes), "payload": (record.head_bytes, tail), "foot": (tail, record.bytes)}
    return range(*parts[place.partition(" ")[2]])


@pytest.mark.parametrize("place", ["shard head", "shard payload", "shard foot", "index.bin", "cache.json"])
def test_a_flipped_bit_is_always_noticed(whole, tmp_path, place):
    chance = random.Random(place)
    choice = positions(whole, place)
    ends = [choice[0], choice[-1]]
    for position in ends + chance.sample(choice, min(120, len(choice))):
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder)
        name = "shard-00000000.arrow" if place.startswith("shard") else place
        flipped(folder / name, position, chance.randrange(8))
        with pytest.raises(CacheError):
            read_everything(folder)
        if place.startswith("shard"):
            with pytest.raises(CacheError, match="is damaged"):
                check_file(folder, read_header(folder).shards[0])
        shutil.rmtree(folder)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", ["shard-00000000.arrow", "index.bin", "cache.json"])
def test_a_truncated_file_is_always_noticed(whole, tmp_path, name, kept):
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / name
    path.write_bytes(path.read_bytes()[: int(kept * (path.stat().st_size - 1))])
    words = {"cache.json": "cannot be read", "index.bin": "is missing or damaged"}.get(name, "bytes, .* were written")
    with pytest.raises(CacheError, match=words):
        read_everything(tmp_path / "copy")


def test_rows_swapped_between_shards_of_one_size_are_noticed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    shutil.copy(whole / "shard-00000001.arrow", tmp_path / "copy" / "shard-00000000.arrow")
    with pytest.raises(CacheError, match=r"shard-00000000\.arrow is damaged"):
        read_everything(tmp_path / "copy")


def test_damage_that_is_not_checked_still_raises_no_foreign_error(whole, tmp_path):
    """With sampled checks most rows are decoded unchecked; garbage in them must not leave as an IndexError."""
    chance, outcomes = np.random.default_rng(0), set()
    first, last = positions(whole, "shard payload")[0], positions(whole, "shard payload")[-1]
    for _ in range(40):
        shutil.copytree(whole, tmp_path / "copy")
        path = tmp_path / "copy" / "shard-00000000.arrow"
        content = bytearray(path.read_bytes())
        content[first : last + 1] = chance.bytes(last + 1 - first)
        path.write_bytes(content)
        reader = CacheReader(tmp_path / "copy", check_all=False)
        reader.row(1, 0)  # takes the one check in sixteen
        try:
            reader.row(0, 0)
            outcomes.add("decoded")
        except CacheError:
            outcomes.add("noticed")
        shutil.rmtree(tmp_path / "copy")
    assert "noticed" in outcomes


def test_a_newer_format_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "cache.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format_version": 3, "created": {"megakd_version": "9.9"}}))
    with pytest.raises(CacheError, match=r"has cache format 3, this megakd \(\S+\) reads up to 2\nhint: .*\(9\.9\)"):
        read_header(tmp_path / "copy")


def test_an_edited_header_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "cache.json"
    path.write_text(path.read_text().replace('"top_k": 7', '"top_k": 6'))
    with pytest.raises(CacheError, match=r"cache\.json cannot be read: .* digest"):
        read_header(tmp_path / "copy")


def test_no_cache_there(tmp_path):
    with pytest.raises(CacheError, match=r"is no logit cache: it has no cache\.json\nhint: record one"):
        CacheReader(tmp_path)


@pytest.mark.parametrize("name", ["shard-00000000.arrow", "index.bin"])
def test_a_file_that_shrinks_under_an_open_reader_is_an_error(whole, tmp_path, name):
    """In a process of its own: what is mapped and gone ends one with SIGBUS."""
    shutil.copytree(whole, tmp_path / "copy")
    program = f"""
import os, sys
from megakd.cache import CacheReader
from megakd.errors import CacheError
from megakd.targets import sample_key
from tests.cache.made import make_sample
ids, mask_S, last_label = make_sample(0)
reader = CacheReader({str(tmp_path / "copy")!r})
assert reader.table(sample_key(ids), mask_S, last_label) is not None
os.truncate({str(tmp_path / "copy" / name)!r}, 0)
try:
    reader.table(sample_key(ids), mask_S, last_label)
except CacheError as error:
    sys.exit(f"CacheError: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.search(rf"CacheError: .*{name}.* it has 0 bytes now, ", done.stderr), done
    assert "hint: copy " in done.stderr


def test_a_row_of_another_sample_is_not_what_was_asked_for(whole, tmp_path):
    """An index that leads elsewhere, with a header that vouches for it."""
    shutil.copytree(whole, tmp_path / "copy")
    content = (whole / "index.bin").read_bytes()
    rows = len(content) // 24
    shard = np.frombuffer(content[16 * rows : 20 * rows], "<u4")
    (tmp_path / "copy" / "index.bin").write_bytes(
        content[: 16 * rows] + (1 - shard).astype("<u4").tobytes() + content[20 * rows :]
    )
    header, changed = read_header(whole), (tmp_path / "copy" / "index.bin").read_bytes()
    index = dataclasses.replace(header.index, digest=digest_of([changed]))
    write_header(tmp_path / "copy", dataclasses.replace(header, index=index))
    with pytest.raises(CacheError, match=r"shard-\d+\.arrow is damaged: row \d is of another sample than the "):
        read_everything(tmp_path / "copy")
