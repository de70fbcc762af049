import dataclasses
import os
import resource
import shutil
import threading

import numpy as np
import pytest

from megakd.cache import CacheReader, build_table, check_identity, encode_row, read_header, writing
from megakd.cache.publish import publishing
from megakd.cache.shard import ShardWriter
from megakd.cache.writer import finish
from megakd.errors import CacheError
from megakd.targets import sample_key
from tests.cache.made import CONTENTS, S, V, make_cache, make_header, make_row, make_sample, write_part
from tests.ranks import forkserver


def look_up(reader, sample):
    ids, mask_S, last_label = sample
    return reader.table(sample_key(ids), mask_S, last_label)


def assert_tables_equal(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_sample_is_found_by_its_content_in_any_order(tmp_path):
    make_cache(tmp_path / "cache", range(12), per_part=5)
    reader = CacheReader(tmp_path / "cache")
    assert len(reader) == 12
    for number in np.random.default_rng(0).permutation(12):
        assert_tables_equal(look_up(reader, make_sample(number)), build_table(make_row(number)))
    assert look_up(reader, make_sample(99)) is None


def test_a_run_may_supervise_less_than_was_recorded_but_not_more(tmp_path):
    make_cache(tmp_path / "cache", range(3))
    reader = CacheReader(tmp_path / "cache")
    ids, mask_S, last_label = make_sample(1)
    fewer_S = mask_S & (np.arange(S) % 3 > 0)
    got = look_up(reader, (ids, fewer_S, last_label if fewer_S[-1] else -1))
    assert_tables_equal(got, build_table(make_row(1)).rows(fewer_S[mask_S]))
    more_S = mask_S.copy()
    more_S[np.flatnonzero(~mask_S)[0]] = True
    with pytest.raises(CacheError, match=r"without 1 of its \d+ supervised positions, first position \d"):
        look_up(reader, (ids, more_S, last_label))


def test_ids_recorded_with_two_masks_and_two_last_labels_are_told_apart(tmp_path):
    ids, mask_S, _ = make_sample(22)
    assert mask_S[-1]
    few_S = mask_S & (np.arange(S) == S - 1)
    samples = [(ids, few_S, 3), (ids, mask_S, 4)]
    with writing(tmp_path, make_header()):
        write_part(tmp_path, 0, [make_row(number, sample=sample) for number, sample in enumerate(samples)])
        finish(tmp_path, make_header())
    reader = CacheReader(tmp_path)
    assert_tables_equal(look_up(reader, samples[0]), build_table(make_row(0, sample=samples[0])))
    assert_tables_equal(look_up(reader, samples[1]), build_table(make_row(1, sample=samples[1])))
    with pytest.raises(CacheError, match=r"with \d as its last label, this run has 9"):
        look_up(reader, (ids, mask_S, 9))
    assert reader.index.duplicates() == 1


def test_keys_that_share_a_half_are_told_apart(tmp_path):
    keys = [b"same 8 b" + end for end in (b"\xff" * 8, b"\0" * 8, b"\x7f" * 8)] + [b"\xff" * 8 + b"same 8 b"]
    with writing(tmp_path, make_header()):
        write_part(tmp_path, 0, [dataclasses.replace(make_row(number), key=key) for number, key in enumerate(keys)])
        finish(tmp_path, make_header())
    index = CacheReader(tmp_path).index
    assert [index.find(key) for key in keys] == [[(0, number)] for number in range(4)]
    assert index.find(b"same 8 b" * 2) == [] and index.duplicates() == 0


def test_interrupted_recordings_go_on_where_they_were(tmp_path):
    want = make_cache(tmp_path / "whole", range(12), per_part=5)
    cut, header = tmp_path / "cut", make_header(parts=3)
    with writing(cut, header):
        write_part(cut, 1, [make_row(number) for number in range(5, 10)])
        (cut / "shard-00000002.arrow").write_bytes(b"half")  # published, but killed before its record was
        (cut / "shard-00000000.json").write_text('{"file": "shard-0')
    with pytest.raises(CacheError, match="1 of 3 parts are there"):  # half a record does not count
        (cut / "shard-00000000.json").unlink()
        CacheReader(cut)
    with pytest.raises(CacheError, match="lacks 2 of 3 parts, first part 0"):
        finish(cut, header)
    before = (cut / "shard-00000001.arrow").stat().st_mtime_ns
    assert make_cache(cut, range(12), per_part=5) == want
    assert (cut / "shard-00000001.arrow").stat().st_mtime_ns == before
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (cut / path.name).read_bytes(), path.name
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_a_lost_shard_of_a_finished_cache_is_recorded_again(tmp_path):
    want = make_cache(tmp_path, range(12), per_part=5)
    (tmp_path / "shard-00000001.arrow").unlink()
    (tmp_path / "shard-00000002.arrow").write_bytes((tmp_path / "shard-00000002.arrow").read_bytes()[:-9])
    assert make_cache(tmp_path, range(12), per_part=5) == want
    assert len(CacheReader(tmp_path)) == 12


@pytest.mark.parametrize("content", [None, b"", b"half"])
def test_a_lost_index_of_a_finished_cache_is_made_again(tmp_path, content):
    want = make_cache(tmp_path, range(12), per_part=5)
    before = (tmp_path / "index.bin").read_bytes()
    (tmp_path / "index.bin").unlink()
    if content is not None:
        (tmp_path / "index.bin").write_bytes(content)
    with pytest.raises(CacheError, match=r"the key index .*index\.bin is missing or damaged: .*\nhint: .*the command"):
        CacheReader(tmp_path)
    with writing(tmp_path, make_header(parts=3)) as whole:
        assert len(whole) == 3 and not read_header(tmp_path).finished, "as if a kill had come before the index"
    assert make_cache(tmp_path, range(12), per_part=5) == want
    assert (tmp_path / "index.bin").read_bytes() == before and len(CacheReader(tmp_path)) == 12


def test_another_recording_is_refused_with_both_values(tmp_path):
    make_cache(tmp_path)
    contents = dataclasses.replace(CONTENTS, top_k=9)
    other = make_header(contents, 3, data={"train": "other", "sequence_length": S})
    words = r"contents\.top_k: was 7, is 9\n  data\.train: was corpus, is other"
    with pytest.raises(CacheError, match=words), writing(tmp_path, other):
        pass
    assert read_header(tmp_path).finished


def test_two_writers_on_one_folder_are_one_too_many(tmp_path):
    header, words = make_header(), rf"written by another `megakd cache` \(\S+ pid {os.getpid()} "
    with writing(tmp_path, header), pytest.raises(CacheError, match=words), writing(tmp_path, header):
        pass
    with writing(tmp_path, make_header()) as whole:
        assert whole == {}


def test_a_folder_with_foreign_shards_is_refused(tmp_path):
    (tmp_path / "shard-00000003.arrow").write_bytes(b"x")
    words = r"has no cache\.json but holds shard-00000003\.arrow"
    with pytest.raises(CacheError, match=words), writing(tmp_path, make_header()):
        pass


@pytest.mark.parametrize("name", ["cache.json", "shard-00000000.arrow", "shard-00000000.json", "index.bin"])
def test_a_disk_that_is_full_at_any_file_is_named_and_leaves_nothing_half(tmp_path, monkeypatch, name):
    want = make_cache(tmp_path / "whole", range(2))
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / f"{name}.x.incomplete").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr("megakd.publish.secrets.token_hex", lambda _: "x")
        with pytest.raises(CacheError, match=rf"{name} could not be written: the disk is full .*\nhint: free space"):
            make_cache(cut, range(2))
    assert not (cut / name).exists() and not list(cut.glob("*.incomplete"))
    assert make_cache(cut, range(2)) == want
    assert same_files(cut, tmp_path / "whole")


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "writer.lock").symlink_to("/dev/full")
    with pytest.raises(CacheError, match=r"writer\.lock could not be written: "):
        make_cache(tmp_path)


def test_a_file_size_limit_is_named(tmp_path):
    """What a quota or `ulimit -f` does: the write fails in the middle of a shard."""
    assert in_process(write_below_a_limit, tmp_path) == 0
    assert not list(tmp_path.glob("shard-*")) and not list(tmp_path.glob("*.incomplete"))
    assert make_cache(tmp_path, range(30), per_part=30).finished


def write_below_a_limit(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    with pytest.raises(CacheError, match=r"shard-00000000\.arrow could not be written: .*File too large"):
        make_cache(folder, range(30), per_part=30)


def in_process(function, *arguments) -> int:
    """The exit code of a function in a process of its own."""
    process = forkserver().Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def same_files(one, other) -> bool:
    a, b = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other))
    return a == b


def test_a_record_of_an_older_shard_of_its_part_does_not_count(tmp_path):
    """Killed between publishing a shard again and its record: the record there is of other bytes of the same length."""
    want = make_cache(tmp_path / "whole", range(12), per_part=5)
    cut, header = tmp_path / "cut", make_header(parts=3)
    with writing(cut, header):
        write_part(cut, 1, [make_row(number) for number in range(5, 10)])
        shard = ShardWriter()
        for number in range(5, 10):
            row = make_row(number)
            shard.add(encode_row(dataclasses.replace(row, top_id_T=row.top_id_T[::-1]), CONTENTS))
        shard.publish(cut / "shard-00000001.arrow", 1)
    assert make_cache(cut, range(12), per_part=5) == want
    assert same_files(cut, tmp_path / "whole")


def test_a_writer_that_outlives_its_launch_cannot_spoil_the_next_ones_shard(tmp_path):
    """A rank may live on for seconds after rank 0 was killed, while the next launch writes the same part."""
    with writing(tmp_path, make_header()):
        pass
    late = publishing(tmp_path / "shard-00000000.arrow")
    with pytest.raises(CacheError, match="could not be written"), late as path, open(path, "wb") as file:
        make_cache(tmp_path, range(1))
        file.write(b"too late")
    assert_tables_equal(look_up(CacheReader(tmp_path), make_sample(0)), build_table(make_row(0)))
    assert not list(tmp_path.glob("*.incomplete"))


def test_what_a_killed_writer_left_is_removed(tmp_path):
    with writing(tmp_path, make_header()):
        pass
    (tmp_path / "shard-00000000.arrow.1f.incomplete").write_bytes(b"half")
    with writing(tmp_path, make_header()):
        assert not list(tmp_path.glob("*.incomplete"))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (dict(temperature=3.0), "recorded at temperature 1, 2, this run wants 3"),
        (dict(top_k=8), "holds 7 entries a token, this run wants 8"),
    ],
)
def test_what_was_not_recorded_is_refused_by_name(tmp_path, wanted, words):
    make_cache(tmp_path)
    with pytest.raises(CacheError, match=words):
        CacheReader(tmp_path, **wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(tokenizer_fingerprint="91bc"), "recorded for tokenizer abc123, this run uses 91bc"),
        (dict(vocab_size=V - 1), "vocabulary of 211, the student has 210"),
        (dict(teacher_fingerprint="beef"), "from teacher f00d, teacher.checkpoint is beef"),
    ],
)
def test_another_tokenizer_vocabulary_or_teacher_is_refused_by_name(tmp_path, change, words):
    header = make_cache(tmp_path)
    fits = dict(tokenizer_fingerprint="abc123", vocab_size=V, teacher_fingerprint="f00d")
    check_identity(tmp_path, header, **fits)
    with pytest.raises(CacheError, match=words):
        check_identity(tmp_path, header, **(fits | change))


def test_shards_copied_in_or_lost_are_named(tmp_path):
    make_cache(tmp_path, range(12), per_part=5)
    shutil.copy(tmp_path / "shard-00000001.arrow", tmp_path / "shard-00000007.arrow")
    with pytest.raises(CacheError, match=r"shard-00000007\.arrow is not listed in"):
        CacheReader(tmp_path)
    (tmp_path / "shard-00000007.arrow").unlink()
    (tmp_path / "shard-00000002.arrow").unlink()
    with pytest.raises(CacheError, match=r"shard-00000002\.arrow is missing, but listed in"):
        CacheReader(tmp_path)


def test_more_shards_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("megakd.cache.reader.OPEN_SHARDS", 2)
    make_cache(tmp_path, range(6), per_part=1)
    reader = CacheReader(tmp_path)
    for number in [0, 1, 2, 3, 4, 5, 0, 3, 0]:
        assert_tables_equal(look_up(reader, make_sample(number)), build_table(make_row(number)))
    assert len(reader._open) == 2


def test_many_threads_read_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr("megakd.cache.reader.OPEN_SHARDS", 2)
    make_cache(tmp_path, range(12), per_part=1)
    reader, failures = CacheReader(tmp_path), []

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, 12, 60):
            table = look_up(reader, make_sample(int(number)))
            if not np.array_equal(table.logprobs_TK, build_table(make_row(int(number))).logprobs_TK):
                failures.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
