"""Rows are encoded and published in threads, and what fails there is not lost."""

import threading

import pytest

from megakd.cache.writer import finish, writing
from megakd.errors import CacheError
from megakd.recording import part_writer
from megakd.recording.part_writer import PartWriter
from tests.cache.made import CONTENTS, make_cache, make_header, make_row

FAILURE = CacheError("the disk is full", hint="free space")


def record(folder, parts):
    """Rows 0 and 1 as part 0 and so on, each part in two calls."""
    with writing(folder, make_header(parts=parts)):
        with PartWriter(folder, CONTENTS, enabled=True) as writer:
            for part in range(parts):
                for number in (2 * part, 2 * part + 1):
                    writer.add([make_row(number)])
                writer.publish(part)
        return finish(folder, make_header(parts=parts))


def test_what_is_recorded_is_what_one_thread_would_write(tmp_path):
    assert record(tmp_path / "threads", 3) == make_cache(tmp_path / "one", range(6), per_part=2)


def test_the_next_part_is_encoded_while_one_is_published(tmp_path, monkeypatch):
    encoded, publish_part = threading.Event(), part_writer.publish_part

    def publish(folder, part, shard):
        if part == 0:
            assert encoded.wait(30), "nothing was encoded meanwhile"
        return publish_part(folder, part, shard)

    def encode(row, contents, encode_row=part_writer.encode_row):
        if row.key == make_row(3).key:
            encoded.set()
        return encode_row(row, contents)

    monkeypatch.setattr(part_writer, "publish_part", publish)
    monkeypatch.setattr(part_writer, "encode_row", encode)
    assert record(tmp_path, 2).rows == 4


@pytest.mark.parametrize("last", [0, 1])
def test_a_part_that_cannot_be_published_stops_the_recording(tmp_path, monkeypatch, last):
    """Of the last part nothing but the end of the block can tell."""

    def fail(folder, part, shard):
        if part == last:
            raise FAILURE

    monkeypatch.setattr(part_writer, "publish_part", fail)
    with pytest.raises(CacheError, match="the disk is full"):
        record(tmp_path, last + 1)


def test_the_next_rows_already_tell_that_a_part_is_lost(tmp_path, monkeypatch):
    def fail(folder, part, shard):
        raise FAILURE

    monkeypatch.setattr(part_writer, "publish_part", fail)
    with pytest.raises(CacheError, match="the disk is full"), PartWriter(tmp_path, CONTENTS, enabled=True) as writer:
        writer.publish(0)
        with pytest.raises(CacheError, match="the disk is full"):
            for number in range(1000):
                writer.add([make_row(number % 5)])
        raise FAILURE


def test_a_row_that_cannot_be_encoded_stops_the_recording(tmp_path):
    row = make_row(0)
    with (
        pytest.raises(ValueError, match="log_tail that is NaN"),
        PartWriter(tmp_path, CONTENTS, enabled=True) as writer,
    ):
        writer.add([make_row(1), type(row)(**{**vars(row), "log_tail_XT": row.log_tail_XT * float("nan")})])


def test_ranks_that_do_not_write_write_nothing(tmp_path):
    with PartWriter(tmp_path, CONTENTS, enabled=False) as writer:
        writer.add([make_row(0)])
        writer.publish(0)
    assert not list(tmp_path.iterdir())
