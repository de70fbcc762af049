"""TextDataset: golden windows and labels, every token predicted once per epoch, orders decided by (seed, epoch)."""

import dataclasses
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.dataset import TextDataset, load_batch
from megakd.data.token_files.layout import load_info, part, write_info
from megakd.errors import DataError
from tests.data.test_token_files import write

TEXT = [[10, 11, 12, 2], [20, 2], [30, 31, 32, 33, 2]]  # 11 tokens


def rows(dataset, epoch=0):
    return [
        (sample["ids"].tolist(), sample["labels"].tolist())
        for sample in (dataset.sample(epoch, index) for index in range(len(dataset)))
    ]


def test_windows_and_labels_by_hand(tmp_path):
    dataset = TextDataset(write(tmp_path / "x", TEXT), 4, seed=None)
    assert rows(dataset) == [
        ([10, 11, 12, 2], [11, 12, 2, 20]),
        ([20, 2, 30, 31], [2, 30, 31, 32]),
        ([32, 33, 2, 0], [33, 2, -100, -100]),
    ]
    assert dataset.tokens_per_epoch == 10 and rows(dataset, 3) == rows(dataset)


def test_window_ends_that_meet_the_end_of_the_text(tmp_path):
    prefix = write(tmp_path / "x", TEXT)
    assert rows(TextDataset(prefix, 5, None)) == [
        ([10, 11, 12, 2, 20], [11, 12, 2, 20, 2]),
        ([2, 30, 31, 32, 33], [30, 31, 32, 33, 2]),
    ]
    assert rows(TextDataset(prefix, 13, None)) == [
        ([10, 11, 12, 2, 20, 2, 30, 31, 32, 33, 2, 0, 0], [11, 12, 2, 20, 2, 30, 31, 32, 33, 2, -100, -100, -100])
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    sequence_length=st.integers(1, 11),
    seed=st.integers(0, 99),
)
def test_each_epoch_is_the_documents_in_some_order_cut_in_windows(tmp_path_factory, lengths, sequence_length, seed):
    """Joining the windows of a shuffled epoch gives whole documents again, and each token but one is a label once."""
    first = np.cumsum([0, *lengths])
    documents = [list(range(first[n], first[n] + length)) for n, length in enumerate(lengths)]
    prefix = write(tmp_path_factory.mktemp("d") / "x", documents, vocab_size=200)
    dataset = TextDataset(prefix, sequence_length, seed)
    for epoch in (0, 1):
        samples = rows(dataset, epoch)
        labels = [label for _, row in samples for label in row if label != -100]
        row = [samples[0][0][0], *labels]
        assert sorted(row) == list(range(first[-1]))
        starts = {document[0]: document for document in documents}
        while row:
            document = starts[row[0]]
            assert row[: len(document)] == document
            row = row[len(document) :]
        for ids, row in samples:
            supervised = sum(label != -100 for label in row)
            assert all(label == -100 for label in row[supervised:])
            assert ids[1:supervised] == row[: supervised - 1]


def test_orders_depend_on_seed_and_epoch_alone(tmp_path):
    prefix = write(tmp_path / "x", [[n, 2] for n in range(3, 40)])
    one, two = TextDataset(prefix, 7, 5), TextDataset(prefix, 7, 5)
    for epoch in (4, 0, 2, 9, 0):  # the order of asking does not matter, nor do dropped orders
        two.sample(epoch, 3)
    assert rows(one, 2) == rows(two, 2)
    assert rows(one, 2) != rows(one, 3)
    assert rows(one, 2) != rows(TextDataset(prefix, 7, 6), 2)


def test_load_batch_stacks_and_fills_up(tmp_path):
    dataset = TextDataset(write(tmp_path / "x", TEXT), 4, seed=None)
    batch = load_batch(dataset, [(0, 2), None, (1, 0)])
    assert batch["ids"].tolist() == [[32, 33, 2, 0], [0, 0, 0, 0], [10, 11, 12, 2]]
    assert batch["labels"].tolist() == [[33, 2, -100, -100], [-100] * 4, [11, 12, 2, 20]]
    assert str(batch["ids"].dtype) == "torch.int64"


def test_what_cannot_be_read_is_refused(tmp_path):
    prefix = write(tmp_path / "x", TEXT)
    with pytest.raises(IndexError):
        TextDataset(prefix, 4, None).sample(0, 3)
    with pytest.raises(IndexError):
        TextDataset(prefix, 4, None).sample(0, -1)
    with pytest.raises(ValueError, match="positive"):
        TextDataset(prefix, 0, None)
    with pytest.raises(DataError, match="written with tokenizer"):
        TextDataset(prefix, 4, None, tokenizer_fingerprint="bb" * 32)
    with pytest.raises(DataError, match="too few"):
        TextDataset(write(tmp_path / "y", [[1]]), 4, None)


def test_a_changed_token_is_caught_when_it_is_read(tmp_path):
    prefix = write(tmp_path / "x", TEXT)
    content = bytearray(part(prefix, ".bin").read_bytes())
    content[2:4] = (500).to_bytes(2, "little")
    part(prefix, ".bin").write_bytes(content)
    with pytest.raises(DataError, match="holds token 500, its vocabulary has 97 ids"):
        TextDataset(prefix, 4, None).sample(0, 0)


def lines_run(work) -> int:
    """Lines of megakd's own code that `work()` runs, however fast the machine is."""
    own, count, before = f"{os.sep}megakd{os.sep}data{os.sep}", 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace if own in frame.f_code.co_filename else None

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def open_and_read(prefix, count, length):
    """A made-up file of `count` documents is opened and ordered, and 50 samples are read."""
    write(prefix, [[1]])
    with part(prefix, ".bin").open("wb") as tokens:
        tokens.truncate(2 * count * length)  # sparse zeros
    index = part(prefix, ".idx").read_bytes()[:18] + np.array([count, count + 1], np.int64).tobytes()
    index += np.full(count, length, np.int32).tobytes() + (np.arange(count) * 2 * length).astype(np.int64).tobytes()
    part(prefix, ".idx").write_bytes(index + np.arange(count + 1, dtype=np.int64).tobytes())
    one = load_info(prefix)
    info = dataclasses.replace(one, documents=count, tokens=count * length, parts=None, format=1)
    write_info(part(prefix, ".json"), info)

    def work():
        dataset = TextDataset(prefix, 1024, seed=3)
        for index in np.linspace(0, len(dataset) - 1, 50).astype(int):
            dataset.sample(0, int(index))

    return lines_run(work)


def test_a_hundred_million_tokens_take_no_more_python_than_a_million(tmp_path):
    """200,000 documents of 500 tokens, and 2,000: nothing goes through them one by one."""
    few, many = (open_and_read(tmp_path / f"{count}", count, 500) for count in (2_000, 200_000))
    assert few > 50 and many < 1.2 * few
