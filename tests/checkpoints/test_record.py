"""A checkpoint's record: its files are those that were saved, at the place where they were saved; replayed crashes."""

import json
import os
import pathlib
import random
import shutil

import pytest

from megakd import digests
from megakd.checkpoints import folder, record
from megakd.checkpoints.folder import read_checkpoint, step_folder, whole_checkpoints
from megakd.digests import DamagedFile, DigestingFile
from megakd.errors import CheckpointError, DamagedCheckpointError
from megakd.publish import publish_text
from megakd.runs import check
from tests.file_operations import crash_states, read_tree, recorded

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 1009,
    "max_sequence_length": 64,
}


def save(run_dir: pathlib.Path, step: int, *, seed: int = 0, **parts) -> pathlib.Path:
    """A checkpoint of two data files and two small ones, written as ranks do, without ranks."""
    from megakd.config import Model

    path, bits = step_folder(run_dir, step), random.Random(f"{step} {seed}")
    target, written = folder.begin(path), {}
    for name in ("__0_0.distcp", "__1_0.distcp"):
        with DigestingFile(target / name) as file:
            file.write(bits.randbytes(5003))
            file.sync()
        written[name] = file.digester.digests()
    for name in (".metadata", "common.pt"):
        (target / name).write_bytes(bits.randbytes(701))
    (target / "hf").mkdir()
    (target / "hf" / "config.json").write_text('{"model_type": "llama"}')
    values = {"model": Model.model_validate(MODEL), "step": step, "training": True, "metrics": {"loss": 1.5}}
    folder.publish(path, tokenizer=None, written=written, run=folder.run_id(run_dir), **values | parts)
    return path


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    publish_text(run / folder.RUN_ID_FILE, "run-a\n")
    return run


def read_all(path: pathlib.Path, verify="always") -> dict[str, bytes]:
    """Every file of a checkpoint, as a loader reads it."""
    files = read_checkpoint(path, verify).files
    return {name: files.read(name) for name in files.sizes}


def test_the_record_describes_what_was_written(run_dir):
    path = save(run_dir, 4, layout={"tp": 2, "pp": 1, "dp": 3})
    checkpoint = read_checkpoint(run_dir)
    assert (checkpoint.path, checkpoint.step, checkpoint.run) == (path, 4, "run-a")
    assert checkpoint.layout == {"tp": 2, "pp": 1, "dp": 3}
    assert read_all(path) == {name: content for name, content in tree(path).items() if name != "megakd.json"}
    assert len(checkpoint.files.sizes) == 5


def tree(path: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_bit_that_flips_in_any_file_is_refused_or_without_effect(run_dir):
    path, bits = save(run_dir, 4), random.Random(1)
    want, whole = read_all(path), read_checkpoint(path)
    files, kept = [file for file in path.rglob("*") if file.is_file()], tree(path)
    noticed = {str(file.relative_to(path)): 0 for file in files}
    for number in range(1000):
        file = files[number % len(files)]
        name = str(file.relative_to(path))
        content = bytearray(kept[name])
        bit = bits.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            assert read_all(path) == want and read_checkpoint(path) == whole, f"{name}: bit {bit} is not noticed"
        except (DamagedCheckpointError, DamagedFile, CheckpointError):
            noticed[name] += 1
        file.write_bytes(kept[name])
    assert all(count > 160 for name, count in noticed.items() if name != "megakd.json"), noticed
    assert noticed["megakd.json"] > 140, "bits of its white space alone have no effect"


def flipped(path: pathlib.Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_file_of_another_step_or_run_is_found(run_dir, tmp_path):
    other, path = save(run_dir, 2), save(run_dir, 4)
    shutil.copy(other / "__1_0.distcp", path / "__1_0.distcp")
    with pytest.raises(DamagedFile, match=r"__1_0\.distcp is damaged between the bytes 0 and 5003"):
        read_all(path)
    path = save(run_dir, 4)
    shutil.copy(other / "common.pt", path / "common.pt")
    with pytest.raises(DamagedCheckpointError, match=r"common\.pt is damaged"):
        read_checkpoint(path)
    shutil.copy(other / "megakd.json", path / "megakd.json")
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_a_renamed_step_is_found(run_dir):
    moved = save(run_dir, 2).rename(step_folder(run_dir, 8))
    with pytest.raises(
        CheckpointError, match=r"step_00000008 holds step 2: it was renamed\nhint: call it step_00000002"
    ):
        read_checkpoint(moved)
    assert read_checkpoint(moved.rename(run_dir / "best")).step == 2


def test_a_checkpoint_of_another_run_is_found_among_the_checkpoints_and_nowhere_else(run_dir, tmp_path):
    path = save(run_dir, 4)
    publish_text(run_dir / folder.RUN_ID_FILE, "run-b\n")
    with pytest.raises(CheckpointError, match=r"was saved by run run-a, .* is run run-b: it was copied there"):
        read_checkpoint(run_dir)
    assert read_checkpoint(shutil.copytree(path, tmp_path / "step_00000004")).run == "run-a"
    os.remove(run_dir / folder.RUN_ID_FILE)
    assert read_checkpoint(run_dir).run == "run-a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(step=5), "its values are not those that were saved"),
        (lambda r: r["metrics"].update(loss=1.4), "its values are not those that were saved"),
        (lambda r: r.pop("digest"), "its values are not those that were saved"),
        (lambda r: r.update(format_version=0), "format_version is 0"),
        (lambda r: r.update(format_version="2"), "format_version is '2'"),
        (lambda r: r.update(format_version=1), "cannot be read: "),
    ],
)
def test_an_edited_record_is_refused(run_dir, change, message):
    path = save(run_dir, 4) / "megakd.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpointError, match=message):
        files = read_checkpoint(run_dir).files
        assert not files.sizes, files


@pytest.mark.parametrize("content", [b"", bytes(700), b"\xff\xfe", b"[]", b"7", b"{}", b'{"format_version": 2}'])
def test_a_record_that_is_none_is_refused(run_dir, content):
    (save(run_dir, 4) / "megakd.json").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"megakd\.json cannot be read: "):
        read_checkpoint(run_dir)


def test_an_older_checkpoint_without_digests_is_read_with_a_warning(run_dir, caplog):
    path = save(run_dir, 4)
    values = json.loads((path / "megakd.json").read_text())
    for key in ("digest", "digests", "run", "layout"):
        del values[key]
    values |= {"format_version": 1, "files": {name: entry["bytes"] for name, entry in values["files"].items()}}
    (path / "megakd.json").write_text(json.dumps(values))
    assert read_checkpoint(run_dir).run is None and len(read_all(path)) == 5
    assert "saved without digests by an older megakd" in caplog.text
    folder.record_metrics(path, {"loss": 1.25})
    assert read_checkpoint(run_dir).metrics == {"loss": 1.25}
    (path / "common.pt").write_bytes(b"short")
    with pytest.raises(DamagedCheckpointError, match=r"common\.pt is 5 bytes long, 701 bytes were saved"):
        read_checkpoint(run_dir)


def test_metrics_are_added_under_the_records_digest(run_dir):
    path = save(run_dir, 4)
    folder.record_metrics(path, {"loss": 1.25})
    assert read_checkpoint(path).metrics == {"loss": 1.25}
    flipped(path / "megakd.json", at=(path / "megakd.json").read_bytes().index(b"1.25"))
    with pytest.raises(DamagedCheckpointError):
        folder.record_metrics(path, {"loss": 1.0})


def test_digests_of_a_kind_that_is_not_known_are_named(run_dir):
    path = save(run_dir, 4)
    values = json.loads((path / "megakd.json").read_text())
    values["digests"]["chunk_bytes"] = 1 << 20
    record.write_record(path, values)
    with pytest.raises(CheckpointError, match=f"this megakd .* knows xxh3_128 of {digests.CHUNK_BYTES}"):
        read_checkpoint(path)


def test_verify_never_and_sampled_look_at_what_they_say(run_dir, monkeypatch):
    monkeypatch.setattr(digests, "CHUNK_BYTES", 100)
    monkeypatch.setattr(record, "CHUNK_BYTES", 100)
    path = save(run_dir, 4)
    flipped(path / "__0_0.distcp", at=350)  # in chunk 3 of 51, which is not among the sampled ones
    assert read_all(path, "never") and read_all(path, "sampled")
    flipped(path / "__0_0.distcp", at=1650)
    with pytest.raises(DamagedFile):
        read_all(path, "sampled")
    assert read_all(path, "never")


def test_check_names_every_damaged_file_and_chunk(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(digests, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(record, "CHUNK_BYTES", 1000)
    save(run_dir, 2)
    path = save(run_dir, 4, layout={"tp": 2, "pp": 1, "dp": 3})
    assert check.main([str(path)]) == 0
    assert (
        f"{path}: step 4 of run run-a, saved at tp 2 x pp 1 x dp 3: 5 files, 11,431 bytes, whole\n"
        == capsys.readouterr().out
    )
    flipped(path / "__1_0.distcp", at=2100)
    flipped(path / "__1_0.distcp", at=4100)
    flipped(path / "common.pt")
    assert check.main([str(run_dir)]) == 1
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("whole") and second.endswith("damaged")
    assert lines == [
        "  __1_0.distcp: 2 of 6 chunks damaged, those at byte 2,000, 4,000",
        "  common.pt: 1 of 1 chunks damaged, those at byte 0",
    ]
    os.remove(path / "common.pt")
    assert check.main([str(path)]) == 1 and "common.pt is missing" in capsys.readouterr().out


def describe(run: pathlib.Path) -> tuple:
    """What a launch finds after a crash: whole, with nothing changed in it, before and after it has tidied up."""
    found = [
        (path.name, hash(tuple(sorted(read_all(path).items()))), read_checkpoint(path).metrics["loss"])
        for path in whole_checkpoints(run)
    ]
    names = [path.name.removesuffix(".replaced") for path in whole_checkpoints(run)]
    folder.settle(run)
    assert [path.name for path in whole_checkpoints(run)] == names
    return tuple((name.removesuffix(".replaced"), *rest) for name, *rest in found)


def replay(tmp_path: pathlib.Path) -> list[tuple]:
    """The different outcomes of `describe`, in the order in which a crash can first lead to them."""
    seen = {}
    for after, state in crash_states(tmp_path / "log", tmp_path / "states"):
        try:
            seen.setdefault(describe(state), after)
        except Exception as error:
            raise AssertionError(f"after {after}: {sorted(read_tree(state))}") from error
    return list(seen)


def test_a_crash_while_a_checkpoint_is_saved_leaves_the_old_ones_or_the_new_one_too(run_dir, tmp_path):
    save(run_dir, 2)
    with recorded(run_dir, tmp_path / "log"):
        save(run_dir, 4)
    before, after = replay(tmp_path)
    assert [name for name, *_ in before] == ["step_00000002"] and after[0] == before[0] and len(after) == 2
    ends = {describe(state) for _, state in crash_states(tmp_path / "log", tmp_path / "ends", at_the_end=True)}
    assert ends == {after}, "the save has returned, and the checkpoint is not durable"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_while_a_step_is_saved_anew_leaves_the_old_or_the_new_one(run_dir, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("megakd.publish.exchange", lambda a, b: False)
    save(run_dir, 2)
    save(run_dir, 4)
    with recorded(run_dir, tmp_path / "log"):
        save(run_dir, 4, seed=1)
    before, after = replay(tmp_path)
    assert [len(before), len(after)] == [2, 2] and before[0] == after[0] and before[1] != after[1]


def test_a_crash_while_metrics_are_added_leaves_the_old_or_the_new_ones(run_dir, tmp_path):
    path = save(run_dir, 4)
    with recorded(run_dir, tmp_path / "log"):
        folder.record_metrics(path, {"loss": 1.25})
    assert [found[0][2] for found in replay(tmp_path)] == [1.5, 1.25]


def test_a_crash_while_old_checkpoints_go_leaves_no_half_one(run_dir, tmp_path):
    for step in (2, 4, 6):
        save(run_dir, step)
    with recorded(run_dir, tmp_path / "log"):
        folder.prune(run_dir, 1, lambda step: step == 2)
    names = [{name for name, *_ in found} for found in replay(tmp_path)]
    assert names == [{"step_00000002", "step_00000004", "step_00000006"}, {"step_00000002", "step_00000006"}]


def test_a_crash_while_a_damaged_one_is_set_aside_leaves_it_where_it_was_or_aside(run_dir, tmp_path):
    for step in (2, 4):
        save(run_dir, step)
    with recorded(run_dir, tmp_path / "log"):
        assert folder.set_aside(step_folder(run_dir, 4)).name == "step_00000004.damaged"
    assert [len(found) for found in replay(tmp_path)] == [2, 1]
    save(run_dir, 4)
    assert folder.set_aside(step_folder(run_dir, 4)).name == "step_00000004.damaged1"
