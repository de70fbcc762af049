"""`--tokenizer CHECKPOINT` finds the tokenizer of any conversion, whatever its file is called."""

import shutil

import pytest

from megakd.checkpoints import folder
from megakd.config import Model
from megakd.converters.convert import tokenizer_of
from megakd.errors import CheckpointError
from tests.training import runs

MODEL = Model(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, max_sequence_length=8)


def publish(path, files):
    folder.begin(path)
    parts = {"model": MODEL, "step": 3, "training": False, "metrics": {}}
    folder.publish(path, tokenizer=tokenizer_of(files), **parts)


@pytest.fixture
def checkpoint(tmp_path):
    """As the conversion of a .nemo archive leaves it: the name of the tokenizer's file begins with a hash."""
    runs.prepare(tmp_path)
    named = tmp_path / "0123abcd_tokenizer.model"
    shutil.copy(tmp_path / "tokenizer.model", named)
    publish(tmp_path / "checkpoint", [named])
    return tmp_path / "checkpoint"


def test_a_checkpoint_and_a_run_folder_have_one_and_other_paths_stay(checkpoint, tmp_path):
    file = checkpoint / "0123abcd_tokenizer.model"
    assert file.is_file() and folder.tokenizer_path(checkpoint) == file
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / "step_00000003")
    found = folder.tokenizer_path(tmp_path / "run")
    assert found == tmp_path / "run" / "checkpoints" / "step_00000003" / file.name
    assert folder.tokenizer_path(str(file)) == file and folder.tokenizer_path(tmp_path) == tmp_path
    publish(tmp_path / "bare", [])
    with pytest.raises(CheckpointError, match=r"bare carries no tokenizer\nhint: name a tokenizer file"):
        folder.tokenizer_path(tmp_path / "bare")


def test_prepare_takes_a_checkpoint_for_a_tokenizer(checkpoint, tmp_path):
    from megakd.runs.prepare import main

    (tmp_path / "a.txt").write_text("def first(): pass\n")
    for name, tokenizer in (("by_file", tmp_path / "tokenizer.model"), ("by_checkpoint", checkpoint)):
        main(["text", "--input", f"{tmp_path}/a.txt", "--tokenizer", str(tokenizer), "--output", f"{tmp_path}/{name}"])
    by_file, by_checkpoint = ((tmp_path / name).read_bytes() for name in ("by_file.bin", "by_checkpoint.bin"))
    assert by_file == by_checkpoint
