"""Publishing: whoever reads a name finds the old content or the new one, whenever the power goes."""

import os
import pathlib

import pytest

from megakd import publish
from tests.file_operations import crash_states, operations, read_tree, recorded

OLD, NEW = b"old" * 700, b"new content" * 500


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def no_exchange(monkeypatch):
    """A file system that cannot exchange two names, as some network file systems."""
    monkeypatch.setattr(publish, "exchange", lambda a, b: False)


def replay(tmp_path: pathlib.Path, check, *, durable: bool = True) -> set:
    """What `check` returns for every folder that a power cut may leave; at the end, that it is one thing."""
    seen = {}
    for after, folder in crash_states(tmp_path / "log", tmp_path / "states"):
        try:
            seen.setdefault(check(folder), after)
        except Exception as error:
            raise AssertionError(f"after {after}: {read_tree(folder).keys()}") from error
    ends = {check(folder) for _, folder in crash_states(tmp_path / "log", tmp_path / "ends", at_the_end=True)}
    assert len(ends) == 1 or not durable, "the save has returned, and what it wrote is not durable"
    return set(seen)


def test_a_file_is_the_old_or_the_new_one_after_every_crash(tmp_path, root):
    (root / "file").write_bytes(OLD)
    with recorded(root, tmp_path / "log"), publish.publishing(root / "file") as partial:
        partial.write_bytes(NEW)
    assert replay(tmp_path, lambda folder: (folder / "file").read_bytes()) == {OLD, NEW}
    assert (root / "file").read_bytes() == NEW and os.listdir(root) == ["file"]


def test_a_file_written_in_place_is_found_out(tmp_path, root):
    """The replay itself: what every save must not do, it sees."""
    (root / "file").write_bytes(OLD)
    with recorded(root, tmp_path / "log"):
        (root / "file").write_bytes(NEW)
    found = replay(tmp_path, lambda folder: (folder / "file").read_bytes(), durable=False)
    assert found == {OLD, NEW, NEW[: len(NEW) // 2], bytes(len(NEW))}


def test_a_rename_without_an_fsync_is_found_out(tmp_path, root):
    (root / "file").write_bytes(OLD)
    with recorded(root, tmp_path / "log"):
        (root / "new").write_bytes(NEW)
        os.replace(root / "new", root / "file")
    assert b"" in replay(tmp_path, lambda folder: (folder / "file").read_bytes(), durable=False)


def write_folder(path: pathlib.Path, content: bytes) -> pathlib.Path:
    (path / "inner").mkdir(parents=True)
    (path / "a").write_bytes(content)
    (path / "inner" / "b").write_bytes(content[::-1])
    return path


def whole(folder: pathlib.Path) -> str:
    tree = read_tree(publish.settled(folder / "target"))
    known = {"old": OLD, "new": NEW}
    (name,) = [name for name, content in known.items() if tree == {"a": content, "inner": {"b": content[::-1]}}]
    return name


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_folder_is_the_old_or_the_new_one_after_every_crash(tmp_path, root, way, request):
    if way == "two renames":
        request.getfixturevalue("no_exchange")
    write_folder(root / "target", OLD)
    with recorded(root, tmp_path / "log"):
        publish.publish_written(write_folder(root / "target.incomplete", NEW), root / "target")
    renames = [name for name, *_ in operations(tmp_path / "log") if name in ("exchange", "rename")]
    assert renames == (["exchange"] if way == "exchange" else ["rename", "rename"])

    def settled(folder):
        found = whole(folder)
        publish.settle(folder / "target")
        assert whole(folder) == found and not publish.replaced(folder / "target").exists()
        return found

    assert replay(tmp_path, settled) == {"old", "new"}
    assert os.listdir(root) == ["target"] and whole(root) == "new"


def test_a_new_folder_is_there_or_not(tmp_path, root):
    with recorded(root, tmp_path / "log"):
        publish.make_folder(root / "runs" / "a")
        publish.publish_written(write_folder(root / "runs" / "a" / "target.incomplete", NEW), root / "runs/a/target")
    found = replay(tmp_path, lambda f: whole(f / "runs" / "a") if (f / "runs" / "a" / "target").exists() else None)
    assert found == {None, "new"}


def test_what_two_renames_left_is_removed_by_the_next(tmp_path, root, no_exchange):
    write_folder(root / "target.replaced", OLD)
    publish.publish_written(write_folder(root / "target.incomplete", NEW), root / "target")
    assert os.listdir(root) == ["target"]


def test_a_failed_block_leaves_the_old_file_and_nothing_else(root):
    (root / "file").write_bytes(OLD)
    with pytest.raises(RuntimeError), publish.publishing(root / "file") as partial:
        partial.write_bytes(NEW)
        raise RuntimeError("no more")
    assert read_tree(root) == {"file": OLD}


def test_a_file_may_take_a_folders_place_and_the_other_way_round(root):
    write_folder(root / "target", OLD)
    (root / "target.incomplete").write_bytes(NEW)
    publish.publish_written(root / "target.incomplete", root / "target")
    assert read_tree(root) == {"target": NEW}
    publish.publish_written(write_folder(root / "target.incomplete", OLD), root / "target")
    assert whole(root) == "old"


def test_sweep_removes_what_killed_writers_left_and_nothing_else(root):
    with pytest.raises(SystemExit), publish.publishing(root / "config.yaml") as partial:
        raise SystemExit
    partial.write_bytes(b"half")
    (root / "mine.incomplete").write_bytes(b"mine")
    publish.sweep(root)
    assert os.listdir(root) == ["mine.incomplete"]


def test_a_folder_that_cannot_be_synced_is_no_error_and_a_broken_disk_is_one(root, monkeypatch):
    numbers = iter([22, 5])  # EINVAL, EIO
    monkeypatch.setattr(publish, "sync", lambda path: (_ for _ in ()).throw(OSError(next(numbers), "fsync")))
    publish.sync_folder(root)
    with pytest.raises(OSError, match="Errno 5"):
        publish.sync_folder(root)
