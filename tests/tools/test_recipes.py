"""The dataset recipes on small files of the public formats."""

import importlib.util
import json
from pathlib import Path

import pytest

from megakd.data.nemo_chat import ChatTokens, nemo_chat_segments
from tests.tools import public_data

TOOLS = Path(__file__).parents[2] / "tools"


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(name, output, *arguments):
    assert recipe(name)([*map(str, arguments), "--output", str(output)]) == 0
    texts = [(output / f"{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "val")]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


@pytest.fixture
def dolly(tmp_path):
    return public_data.dolly(tmp_path / "databricks-dolly-15k.jsonl")


def test_dolly(dolly, tmp_path):
    train, val = run("prepare_dolly", tmp_path / "out", "--input", dolly)
    assert (len(train), len(val)) == (57, 3)
    orders = set()
    by_output = {row["output"]: row for row in train + val}
    for n, line in enumerate(dolly.read_text(encoding="utf-8").splitlines()):
        source = json.loads(line)
        row = by_output[source["response"]] if n % 2 == 0 else None
        if row:
            instruction, context = source["instruction"].strip(), source["context"].strip()
            first = f"{instruction}\n\n{context}" if context else instruction
            assert row["input"] in (first, f"{context}\n\n{instruction}") and row["category"] == source["category"]
            orders |= {row["input"].startswith(instruction)} if context else set()
    assert orders == {True, False}


def test_dolly_is_the_same_again_and_another_with_another_seed(dolly, tmp_path):
    first = run("prepare_dolly", tmp_path / "a", "--input", dolly, "--validation", "0.2")
    assert run("prepare_dolly", tmp_path / "b", "--input", dolly, "--validation", "0.2") == first
    other = run("prepare_dolly", tmp_path / "c", "--input", dolly, "--validation", "0.2", "--seed", "7")
    assert {row["output"] for row in other[1]} != {row["output"] for row in first[1]} and len(other[1]) == 12
    assert {row["input"] for row in first[0] + first[1]} != {row["input"] for row in other[0] + other[1]}


def test_dolly_names_rows_it_cannot_use(dolly, tmp_path, capsys):
    with dolly.open("a") as file:
        file.write('{"instruction": "x", "context": "", "response": ""}\n{"instruction": "x"}\n')
    assert recipe("prepare_dolly")(["--input", str(dolly), "--output", str(tmp_path / "o")]) == 1
    shown = capsys.readouterr().err
    assert (
        ":61: no text under response" in shown and ":62: no text under context, response (found instruction)" in shown
    )
    assert not (tmp_path / "o").exists()
    assert sum(map(len, run("prepare_dolly", tmp_path / "o", "--input", dolly, "--on-error", "skip"))) == 60


def values(row):
    return [(turn["from"], turn["value"]) for turn in row["conversations"]]


BEST = [
    ("User", "What is Rome?"), ("Assistant", "Rome is a city that I like."), ("User", "And where is it?"),
    ("Assistant", "It lies far from Oslo."),
]  # fmt: skip


def test_best_threads_by_hand(tmp_path):
    """Of tree 1 (Rome): the better ranked reply, not the first; the last question has no answer and is cut off."""
    trees = public_data.trees(tmp_path / "x.trees.jsonl.gz")
    train, val = run("prepare_openassistant", tmp_path / "out", "--input", trees)
    assert (len(train), len(val)) == (38, 2)
    found = [row for row in train + val if values(row)[0][1] == "What is Rome?"]
    assert all(values(row) == BEST for row in found) and len(found) == 3
    assert found[0]["mask"] == "User" and found[0]["type"] is None and "label" not in found[0]["conversations"][1]
    supervised = [text for text, learnt in nemo_chat_segments(found[0], ChatTokens()) if learnt]
    assert supervised == ["Rome is a city that I like.\n\x11", "It lies far from Oslo.\n\x11"]


def test_all_threads_with_labels_by_hand(tmp_path):
    trees = public_data.trees(tmp_path / "x.trees.jsonl.gz", count=2)
    arguments = ["--threads", "all", "--labels", "--validation", "0", "--system", "S"]
    train, val = run("prepare_openassistant", tmp_path / "out", "--input", trees, *arguments)
    rome = sorted((row for row in train if values(row)[0][1] == "What is Rome?"), key=lambda row: len(values(row)))
    assert val == [] and len(train) == 4
    assert rome[0]["conversations"] == [
        {"from": "User", "value": "What is Rome?", "label": None},
        {"from": "Assistant", "value": "Rome is a place.", "label": "quality:1,toxicity:0"},
    ]
    assert values(rome[1]) == [*BEST, ("User", "Thank you!")]
    assert rome[1]["conversations"][3]["label"] == "quality:4,toxicity:0,humor:2"
    assert rome[1]["system"] == "S" and rome[1]["type"] == "VALUE_TO_TEXT"


@pytest.mark.parametrize("more", [[], ["--threads", "all", "--labels"], ["--lang", "de"]])
def test_trees_messages_and_parquet_give_the_same(tmp_path, more):
    made = [
        run("prepare_openassistant", tmp_path / kind.__name__, "--input", kind(tmp_path / name), *more)
        for kind, name in (
            (public_data.trees, "x.trees.jsonl.gz"),
            (public_data.messages, "x.messages.jsonl.gz"),
            (public_data.parquet, "train-00000-of-00001.parquet"),
        )
    ]
    assert made[0] == made[1] == made[2]
    assert sum(map(len, made[0])) == {0: 40, 3: 80, 2: 10}[len(more)]


def test_a_tree_is_in_one_part_only(tmp_path):
    trees = public_data.trees(tmp_path / "x.trees.jsonl.gz", count=13)
    train, val = run(
        "prepare_openassistant", tmp_path / "out", "--input", trees, "--threads", "all", "--validation", "0.4"
    )
    roots = [{values(row)[0] for row in part} for part in (train, val)]
    assert not roots[0] & roots[1] and len(roots[1]) == 5


def test_openassistant_names_what_it_cannot_use(tmp_path, capsys):
    path = tmp_path / "x.messages.jsonl"
    rows = [
        {"message_id": "1", "text": "a", "role": "moderator"},
        {"message_id": "2", "role": "prompter"},
        {"message_id": "3", "parent_id": "9", "text": "a", "role": "assistant"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recipe("prepare_openassistant")(["--input", str(path), "--output", str(tmp_path / "o")]) == 1
    shown = capsys.readouterr().err
    for complaint in (":1: unknown role 'moderator'", ':2: no message with a "text"', "message 3: its parent 9 is not"):
        assert complaint in shown
