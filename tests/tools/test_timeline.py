"""The picture of a traced step: what each stretch of time is, from names and order alone."""

import gzip
import json
import xml.etree.ElementTree

import pytest

from tools import timeline

BACKWARD = "autograd::engine::evaluate_function: MmBackward0"
# (name, start, length) in microseconds, as the last stage of a pipeline has them.
EVENTS = [
    ("forward only", 100_000, 40_000),
    ("aten::mm", 110_000, 9_000),  # inside of it
    ("aten::topk", 141_000, 5_000),
    ("aten::sum", 146_100, 2_000),
    ("c10d::recv_", 149_000, 30_000),  # waits
    ("forward", 200_000, 20_000),
    ("aten::mm", 221_000, 4_000),
    (BACKWARD, 226_000, 15_000),
    (BACKWARD, 241_050, 15_000),
    ("forward", 300_000, 20_000),
    (BACKWARD, 321_000, 30_000),
    ("aten::add_", 352_000, 8_000),
]


def trace(path, shift=0):
    events = [
        {"ph": "X", "cat": "cpu_op", "name": name, "ts": start + shift, "dur": length, "tid": 1}
        for name, start, length in EVENTS
    ]
    events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900_000, "tid": 2})  # another thread
    with gzip.open(path, "wt") as file:
        json.dump({"baseTimeNanoseconds": 5_000_000, "traceEvents": events[::-1]}, file)


def test_spans_are_named_by_what_was_before(tmp_path):
    trace(tmp_path / "rank_00000.json.gz")
    spans = timeline.read_spans(tmp_path / "rank_00000.json.gz")
    assert [(span.what, span.start - 5, round(span.stop - 5, 2)) for span in spans] == [
        ("teacher forward", 100, 140),
        ("teacher's targets", 141, 148.1),
        ("student forward", 200, 220),
        ("student loss", 221, 225),
        ("student backward", 226, 256.05),
        ("student forward", 300, 320),
        ("student backward", 321, 351),
        ("update", 352, 360),
    ]


def test_the_picture_has_a_line_for_every_rank(tmp_path):
    for rank in range(2):
        trace(tmp_path / f"rank_0000{rank}.json.gz", shift=rank * 10_000)
    ranks = {rank: timeline.read_spans(tmp_path / f"rank_0000{rank}.json.gz") for rank in range(2)}
    root = xml.etree.ElementTree.fromstring(timeline.draw(ranks, "a & b"))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a & b" and {"rank 0", "rank 1", "1", "2", "waiting"} <= set(texts)
    assert texts[-1] == "270 ms from left to right"
    assert len([title for title in root.iter("{http://www.w3.org/2000/svg}title")]) == 16


def test_a_trace_without_the_names_is_refused(tmp_path):
    with gzip.open(tmp_path / "rank_00000.json.gz", "wt") as file:
        json.dump({"traceEvents": [{"ph": "X", "name": "aten::mm", "ts": 0, "dur": 1, "tid": 1}]}, file)
    with pytest.raises(ValueError, match="names no forward pass"):
        timeline.read_spans(tmp_path / "rank_00000.json.gz")
