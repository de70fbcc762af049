"""verify, merge and stat, through the command line's own function."""

import dataclasses
import itertools

import numpy as np
import pytest

from megakd.cache import CacheReader, read_header, writing
from megakd.cache.fingerprint import BLOCK_BYTES, folder_fingerprint
from megakd.cache.stat import draw, measure
from megakd.cache.verify import verify
from megakd.cache.writer import finish
from megakd.errors import CacheError
from megakd.runs.cache_tools import main
from tests.cache.made import CONTENTS, make_cache, make_header, make_row, write_part
from tests.cache.test_folder import assert_tables_equal, look_up, make_sample


def test_verify_names_every_damaged_shard_at_once(tmp_path, capsys):
    make_cache(tmp_path, range(12), per_part=4)
    assert main(["verify", str(tmp_path)]) == 0
    assert "12 samples and" in capsys.readouterr().out
    for part in (0, 2):
        path = tmp_path / f"shard-0000000{part}.arrow"
        content = bytearray(path.read_bytes())
        content[read_header(tmp_path).shards[part].head_bytes + 9] ^= 1
        path.write_bytes(content)
    with pytest.raises(CacheError) as caught:
        main(["verify", str(tmp_path)])
    assert "shard-00000000.arrow is damaged" in str(caught.value)
    assert "shard-00000002.arrow is damaged" in str(caught.value) and "00000001" not in str(caught.value)


def test_verify_finds_rows_whose_entries_and_tail_are_no_distribution(tmp_path):
    with writing(tmp_path, make_header()):
        row = make_row(0)
        write_part(tmp_path, 0, [dataclasses.replace(row, logprobs_N=row.logprobs_N - np.float32(0.1)), make_row(1)])
        finish(tmp_path, make_header())
    with pytest.raises(CacheError, match=r"row 0: entries and tail of token 0 sum to 0\.9\d+, expected 1"):
        verify(tmp_path)


def test_verify_finds_an_index_of_other_rows(tmp_path):
    make_cache(tmp_path / "a", range(4))
    make_cache(tmp_path / "b", range(4, 8))
    header = read_header(tmp_path / "a")
    index = read_header(tmp_path / "b").index
    (tmp_path / "a" / "index.bin").write_bytes((tmp_path / "b" / "index.bin").read_bytes())
    from megakd.cache.header import write_header

    write_header(tmp_path / "a", dataclasses.replace(header, index=index))
    with pytest.raises(CacheError, match="row 0: the index does not find its key"):
        verify(tmp_path / "a")


def test_merged_recordings_are_one_and_the_inputs_stay(tmp_path, capsys):
    make_cache(tmp_path / "a", range(5), per_part=2, data={"start": 0})
    make_cache(tmp_path / "b", range(4, 9), per_part=3, data={"start": 4})
    out = str(tmp_path / "c")
    main(["merge", "--output", out, str(tmp_path / "a"), str(tmp_path / "b")])
    assert "10 samples and" in (said := capsys.readouterr().out) and "1 of them recorded more than once" in said
    reader = CacheReader(out)
    for number in range(9):
        assert_tables_equal(look_up(reader, make_sample(number)), original(tmp_path, number))
    assert verify(out).data == {"merged": [{"start": 0}, {"start": 4}]}
    assert verify(tmp_path / "a").rows == verify(tmp_path / "b").rows == 5
    main(["merge", "--output", out, str(tmp_path / "a"), str(tmp_path / "b")])  # again: nothing to do


def test_a_cache_is_not_merged_with_itself_under_whatever_name(tmp_path):
    make_cache(tmp_path / "a", range(2))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for output, inputs, words in (
        ("c", ["a", "link"], "a is given more than once"),
        ("link", ["a"], "input and output"),
    ):
        with pytest.raises(CacheError, match=words):
            main(["merge", "--output", str(tmp_path / output), *(str(tmp_path / name) for name in inputs)])
    assert not (tmp_path / "c").exists()


def test_stat_names_what_it_cannot_do(tmp_path):
    make_cache(tmp_path / "cache", range(2))
    with pytest.raises(CacheError, match=r"none/mass\.png could not be written: .*\nhint: choose a folder"):
        main(["stat", str(tmp_path / "cache"), "--plot", str(tmp_path / "none" / "mass.png")])
    with pytest.raises(CacheError, match=r"--rows is 0\nhint: "):
        main(["stat", str(tmp_path / "cache"), "--rows", "0"])


def original(folder, number):
    return look_up(CacheReader(folder / ("a" if number < 5 else "b")), make_sample(number))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(teacher_fingerprint="beef"), "teacher_fingerprint"),
        (dict(contents=dataclasses.replace(CONTENTS, codec="q8")), "contents"),
        (dict(tail="derived"), "tail"),
    ],
)
def test_recordings_of_another_kind_do_not_merge(tmp_path, change, word):
    make_cache(tmp_path / "a", range(2))
    make_cache(tmp_path / "b", range(2, 4), **change)
    with pytest.raises(CacheError, match=rf"cannot be one cache: {word} is"):
        main(["merge", "--output", str(tmp_path / "c"), str(tmp_path / "a"), str(tmp_path / "b")])
    assert not (tmp_path / "c").exists()


def test_imported_caches_are_merged_only_where_their_teacher_is_said_to_be_one(tmp_path, capsys):
    for name, samples in (("a", range(3)), ("b", range(3, 5))):
        make_cache(tmp_path / name, samples, teacher_fingerprint="")
    command = ["merge", "--output", str(tmp_path / "ab"), str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(CacheError, match=r"do not say from which teacher their logits are\nhint: .*--same-teacher"):
        main(command)
    assert not (tmp_path / "ab").exists()
    main([*command, "--same-teacher"])
    assert "5 samples" in capsys.readouterr().out
    main(["merge", "--output", str(tmp_path / "again"), str(tmp_path / "a")])  # one alone is no question


@pytest.mark.parametrize(("least", "most"), [(0.02, 0.09), (1e-9, 0.5), (0.3, 0.9), (1e-6, 2e-6)])
def test_numbers_at_the_axes_do_not_overlap(tmp_path, least, most):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    make_cache(tmp_path)
    missing_T = np.exp(np.random.default_rng(0).uniform(np.log(least), np.log(most), 3000))
    figure = draw(dataclasses.replace(measure(tmp_path), mass_T=1 - missing_T))
    figure.canvas.draw()
    left, right = figure.axes
    for axis, place in ((left.xaxis, "x"), (right.yaxis, "y")):
        labels = axis.get_ticklabels(which="both")
        boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
        ends = sorted((getattr(box, f"{place}0"), getattr(box, f"{place}1")) for box in boxes)
        assert len(ends) >= 2 and all(a[1] < b[0] for a, b in itertools.pairwise(ends)), ends
    pyplot.close(figure)


def test_a_damaged_or_unfinished_input_is_not_merged(tmp_path):
    make_cache(tmp_path / "a", range(2))
    with writing(tmp_path / "b", make_header(parts=2)):
        pass
    with pytest.raises(CacheError, match="is not finished: 0 of 2 parts"):
        main(["merge", "--output", str(tmp_path / "c"), str(tmp_path / "a"), str(tmp_path / "b")])
    shard = tmp_path / "a" / "shard-00000000.arrow"
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    with pytest.raises(CacheError, match=r"a/shard-00000000\.arrow is damaged: the digest of its metadata"):
        main(["merge", "--output", str(tmp_path / "c"), str(tmp_path / "a")])
    assert not list((tmp_path / "c").glob("*.arrow"))


def test_stat_says_what_is_there(tmp_path, capsys):
    header = make_cache(tmp_path / "cache", range(6), per_part=3)
    main(["stat", str(tmp_path / "cache"), "--plot", str(tmp_path / "mass.png")])
    said = capsys.readouterr().out
    stats = measure(tmp_path / "cache")
    rows = [make_row(number) for number in range(6)]
    mass_T = np.concatenate([np.exp(row.logprobs_N).reshape(-1, CONTENTS.top_k).sum(1) for row in rows])
    np.testing.assert_allclose(stats.mass_T, mass_T, rtol=1e-5)
    assert f"{header.tokens:,} supervised" in said and f"mass kept   mean {mass_T.mean():.4f}" in said
    labels = np.concatenate([row.label_logprob_T for row in rows])
    assert f"teacher CE  {-labels.mean():.4f} nats" in said
    files = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert f"{files:,}, {files / header.tokens:.1f} a token" in said
    assert (tmp_path / "mass.png").read_bytes()[:4] == b"\x89PNG"


def test_stat_of_an_empty_cache(tmp_path, capsys):
    with writing(tmp_path, make_header()):
        write_part(tmp_path, 0, [])
        finish(tmp_path, make_header())
    main(["stat", str(tmp_path), "--plot", str(tmp_path / "mass.png")])
    assert "samples       0 in 1 shards" in capsys.readouterr().out
    assert verify(tmp_path).rows == 0


def test_a_teachers_fingerprint_follows_its_bytes_and_not_its_place(tmp_path):
    def checkpoint(name, content, record="{}"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights.distcp").write_bytes(content)
        (folder / "megakd.json").write_text(record)
        return folder_fingerprint(folder)

    content = bytes(range(256)) * 8 * (BLOCK_BYTES // 256)
    first = checkpoint("a", content)
    assert checkpoint("b", content, record='{"step": 2}') == first
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    assert checkpoint("c", bytes(changed)) != first
    assert checkpoint("d", content[:-1]) != first
