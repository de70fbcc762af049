"""Reading documents: which files, which lines, and every complaint with its place."""

import json

import pytest

from megakd.data.documents import Problems, find_files, read_documents
from megakd.errors import DataError


def texts(files, problems=None):
    return [document.text for document in read_documents(files, problems or Problems())]


def test_folders_are_searched_in_sorted_order_and_by_suffix(tmp_path):
    for name in ["b.py", "a/z.py", "a.py", "a/x.txt", "c.bin", "d.py/e.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = find_files([tmp_path], [".py"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.py", "a/z.py", "b.py", "d.py/e.py"]
    assert find_files([tmp_path / "c.bin", tmp_path / "b.py"], [".py"]) == [tmp_path / "c.bin", tmp_path / "b.py"]


def test_text_is_kept_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\n\n ".encode())
    (tmp_path / "b.jsonl").write_bytes(
        '\ufeff{"text": "x\\ny"}\n\n   \n{"text": "", "other": 1}\n{"text": "\ufefflast"}'.encode()
    )
    assert texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["one\r\ntwo\rthree\n\n ", "x\ny", "", "\ufefflast"]


def test_input_bytes_add_up_to_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "é"}\n{"text": "b"}\n', encoding="utf-8")
    assert sum(document.input_bytes for document in read_documents([path], Problems())) == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a"', "broken JSON"),
        (b'{"text" "a"}', "broken JSON"),
        (b'{"txt": "a", "id": 3}', 'no key "text" (found id, txt)'),
        (b"{}", 'no key "text" (found an empty object)'),
        (b'["text"]', 'no key "text" (found a list)'),
        (b'{"text": 3}', '"text" is a int, not a string'),
        (b'{"text": null}', '"text" is a NoneType, not a string'),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
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
    path.write_text("\n".join(json.dumps({"n": n}) for n in range(23)))
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
