"""Reading records: which files, which lines and rows, and every complaint with its place."""

import csv
import gzip
import io
import json
import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megakd.data.blocks import read_blocks
from megakd.data.files import find_files
from megakd.data.records import Problems, records_of
from megakd.errors import DataError


def records(files, problems, block_bytes=1 << 22):
    return [pair for block in read_blocks(files, block_bytes) for pair in records_of(block, problems)]


def texts(files, problems=None, **more):
    return [record["text"] for _, record in records(files, problems or Problems(), **more)]


def test_folders_are_searched_in_sorted_order_and_by_suffix(tmp_path):
    for name in ["b.py", "a/z.py", "a.py", "a/x.txt", "c.bin", "d.py/e.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = find_files([tmp_path], [".py"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.py", "a/z.py", "b.py", "d.py/e.py"]
    named = [tmp_path / "c.bin", tmp_path / "a" / "x.txt", tmp_path / "b.py"]
    assert find_files(named, [".bin"]) == named
    with pytest.raises(DataError, match=r"ending \.bin holds is not known\nhint: name a token file by its prefix"):
        find_files(named, [".py"])


def test_text_is_kept_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\n\n ".encode())
    (tmp_path / "b.jsonl").write_bytes(
        '\ufeff{"text": "x\\ny"}\n\n   \n{"text": "", "other": 1}\n{"text": "\ufefflast"}'.encode()
    )
    assert texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["one\r\ntwo\rthree\n\n ", "x\ny", "", "\ufefflast"]


@pytest.mark.parametrize("block_bytes", [1, 20, 64, 1 << 20])
def test_blocks_change_neither_records_nor_their_numbers(tmp_path, block_bytes):
    """Lines longer and shorter than a block, an empty one, no newline at the end; gzip too. Sizes add up."""
    lines = [json.dumps({"text": letter * 13 * n}) for n, letter in enumerate("abcdefg")]
    content = "\n".join([*lines[:3], "", *lines[3:]]).encode()
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        found = records([path], Problems(), block_bytes)
        assert [record for _, record in found] == [json.loads(line) for line in lines]
        assert [where for where, _ in found] == [f"{path}:{n}" for n in (1, 2, 3, 5, 6, 7, 8)]
        assert sum(block.input_bytes for block in read_blocks([path], block_bytes)) == path.stat().st_size


@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 20])
def test_parquet_and_arrow_hold_the_same_records(tmp_path, block_bytes):
    rows = [{"input": f"question {n}", "output": "é" * n, "turns": [{"role": "user"}] * (n % 3)} for n in range(17)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        path = tmp_path / name
        found = records([path], Problems(), block_bytes)
        assert [record for _, record in found] == rows
        assert [where for where, _ in found] == [f"{path}: row {n}" for n in range(1, 18)]
        assert sum(block.input_bytes for block in read_blocks([path], block_bytes)) == path.stat().st_size


def test_a_folder_saved_by_datasets_is_read_in_its_own_order(tmp_path):
    """The layout of `Dataset.save_to_disk`: Arrow streams listed by state.json."""
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for number, name in enumerate(names):
        table = pa.table({"text": [f"part {number}"]})
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert texts(find_files([tmp_path])) == ["part 0", "part 1"]
    (tmp_path.parent / "both").mkdir()
    (tmp_path.parent / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits train, test\nhint: name one: .*/both/train"):
        find_files([tmp_path.parent / "both"])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x1f\x8bnot such a file")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        records([tmp_path / name], Problems())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a"', "broken JSON"),
        (b'{"text" "a"}', "broken JSON"),
        (b'["text"]', "a list, not an object with keys"),
        (b"3", "a int, not an object with keys"),
        (b'{"text": "a\xff"}', "not UTF-8: byte 0xff at offset 11, line 2"),
        (b"[" * 100_000, "broken JSON"),
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    problems = Problems("skip")
    assert texts([path], problems) == ["before", "after"]
    assert problems.count == 1 and problems.shown[0].startswith(f"{path}:2: ") and complaint in problems.shown[0]
    problems.check()
    with pytest.raises(DataError, match="1 record of the input"):
        raising = Problems()
        texts([path], raising)
        raising.check()


def test_a_file_that_is_not_utf8_is_named_with_offset_and_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9 three")
    problems = Problems()
    assert texts([path], problems) == []
    assert problems.shown == [f"{path}: not UTF-8: byte 0xe9 at offset 11, line 3 (invalid continuation byte)"]


def test_the_first_ten_problems_are_shown_and_all_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps([n]) for n in range(23)))
    problems = Problems()
    texts([path], problems)
    with pytest.raises(DataError) as caught:
        problems.check()
    message = str(caught.value)
    assert "23 records" in message and "and 13 more" in message and f"{path}:10:" in message
    assert f"{path}:11:" not in message


def test_missing_input_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no \.txt, .* file in"):
        find_files([tmp_path])


ROWS = [{"input": f"Q {n}", "output": 'a, "b"\r\n[]{}\\' * n + "é"} for n in range(7)]


def written(path, content):
    """A file with what its name promises, compressed if it says so."""
    content = content.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def as_fields(delimiter):
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter)
    table.writerow(["input", "output"])
    table.writerows(row.values() for row in ROWS)
    return text.getvalue()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.json", json.dumps(ROWS), ": item 7"),
        ("a.json", json.dumps(ROWS, indent=1, ensure_ascii=False), ": item 7"),
        ("a.json", "\ufeff\n [" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", ": item 7"),
        ("a.json", "\n".join(map(json.dumps, ROWS)), ":7"),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), ": item 7"),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)), ":7"),
        ("a.csv", as_fields(","), ":29"),
        ("a.csv", "\ufeff" + as_fields(","), ":29"),
        ("a.tsv", as_fields("\t"), ":29"),
    ],
)
def test_every_kind_of_file_holds_the_same_records(tmp_path, ending, block_bytes, name, content, place):
    path, problems = written(tmp_path / f"{name}{ending}", content), Problems()
    found = records([path], problems, block_bytes)
    assert [record for _, record in found] == ROWS and not problems.count
    assert len({where for where, _ in found}) == 7 and found[-1][0] == f"{path}{place}"
    assert sum(block.input_bytes for block in read_blocks([path], block_bytes)) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "good", "complaint"),
    [
        ("a.json", '[{"text": "a"}, {"text": oops}]', ["a"], ": item 2: broken JSON"),
        ("a.json", '[{"text": "a"}, {"text": "b"', ["a"], ": item 2: broken JSON"),
        ("a.json", '[{"text": "a"}, 3, {"text": "b"}]', ["a", "b"], ": item 2: a int, not an object"),
        ("a.csv", "text,n\na,1\nb\nc,2\n", ["a", "c"], ":3: 1 fields, the line of names has 2"),
        ("a.csv", b"text,n\na,1\n\xe9,2\n", ["a"], ":3: not UTF-8: byte 0xe9"),
    ],
)
def test_a_bad_record_of_any_kind_is_named(tmp_path, name, content, good, complaint):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = Problems()
    assert texts([tmp_path / name], problems) == good
    assert problems.count == 1 and problems.shown[0].startswith(f"{tmp_path / name}{complaint}")


def broken_values(path):
    values = [pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, *values])}), path)


def broken_names(path):
    pq.write_table(pa.table({"text": ["a"]}), path)
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xfft"))


def broken_gzip(path):
    content = gzip.compress(b'{"text": "a"}\n' * 20_000, 1)
    path.write_bytes(content[:10] + b"\x07" + content[11:])  # a block of a type that there is not


def test_values_of_a_table_that_are_not_utf8_are_named_by_row(tmp_path):
    broken_values(tmp_path / "a.parquet")
    problems = Problems()
    assert texts([tmp_path / "a.parquet"], problems) == ["a"]
    assert problems.shown == [
        f"{tmp_path}/a.parquet: row 2: not UTF-8: byte 0xff at offset 0, line 1 (invalid start byte)"
    ]


@pytest.mark.parametrize(
    ("name", "make", "complaint"),
    [
        ("a.parquet", broken_names, r"a\.parquet is not the \.parquet file that its ending says"),
        ("a.jsonl.gz", broken_gzip, r"a\.jsonl\.gz is not the \.gz file"),
        ("a.jsonl.zst", broken_gzip, r"a\.jsonl\.zst"),
        ("a.arrow", lambda path: path.write_bytes(b""), r"a\.arrow is not the \.arrow file"),
        ("a.csv", lambda path: path.write_text('a,b\n"c,d\n'), r"a\.csv:2: broken CSV"),
        ("a.csv", lambda path: path.write_text("a,a\n"), "two columns have one name: a, a"),
    ],
)
def test_damage_of_any_kind_is_named(tmp_path, name, make, complaint):
    make(tmp_path / name)
    with pytest.raises(DataError, match=complaint):
        records([tmp_path / name], Problems())


def test_patterns_are_expanded_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "d.txt", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    names = lambda found: [path.relative_to(tmp_path).as_posix() for path in found]  # noqa: E731
    assert names(find_files([f"{tmp_path}/?.jsonl"])) == ["a.jsonl", "b.jsonl"]
    assert names(find_files([f"{tmp_path}/**/c.jsonl", f"{tmp_path}/d.*"])) == ["deep/er/c.jsonl", "d.txt"]
    assert names(find_files([f"{tmp_path}/[x].jsonl"])) == ["[x].jsonl"]  # a file of that name is that file
    with pytest.raises(DataError, match="nothing matches"):
        find_files([f"{tmp_path}/*.csv"])


@pytest.mark.parametrize("name", ["a.bin", "a.zip", "a.parquet.gz", "a.xlsx", "a.rst", "LICENSE"])
def test_a_file_of_unknown_kind_is_not_taken_for_text(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(DataError, match=r"holds is not known\nhint: .*Known are \.jsonl"):
        find_files([tmp_path / name])


def test_a_file_whose_name_is_no_utf8(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    os.rename(tmp_path / "a.parquet", f"{name}.parquet")
    pathlib.Path(f"{name}.jsonl").write_text('{"text": "b"}')
    assert texts([pathlib.Path(f"{name}.parquet"), pathlib.Path(f"{name}.jsonl")]) == ["a", "b"]
