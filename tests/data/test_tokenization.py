"""Tokenization as work: its memory, its worker processes, a document in pieces."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megakd.data import blocks, tokenization
from megakd.data.formats import SampleFormat
from megakd.data.token_files.reader import TokenFile
from megakd.data.tokenization import write_token_file
from tests.data.conftest import CODE

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
PEAK = r"""
import pathlib, re, sys
from megakd.runs.prepare import main
main(["text", "--input", sys.argv[1], "--tokenizer", sys.argv[2], "--output", sys.argv[1] + ".out", "--workers", "1"])
print(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""
WAITING = """
import multiprocessing, sys, time
from pathlib import Path
from megakd.data import tokenization
from megakd.data.blocks import Block
from megakd.data.formats import SampleFormat

def blocks():
    yield Block("text", "x", 1, b"hello", 5)
    yield Block("text", "x", 1, b"hello", 5)
    time.sleep(1)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with tokenization._encoding(Path(sys.argv[1]), SampleFormat("text"), 2) as encode:
        list(encode(blocks(), lambda: False))
"""


def peak_bytes(path, tokenizer):
    command = [sys.executable, "-c", PEAK, str(path), str(tokenizer.files[0])]
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


def test_the_memory_of_a_text_does_not_grow_with_it(tmp_path, tokenizer):
    """Lists of all its ids would be 16 MB a MB: 190 MB for 12 MB more; allowed are 48."""
    sizes = {}
    for name, copies in (("small.txt", 1), ("large.txt", 7)):
        (tmp_path / name).write_text(CODE * (copies * 2_000_000 // len(CODE)))
        sizes[name] = peak_bytes(tmp_path / name, tokenizer)
    assert sizes["large.txt"] - sizes["small.txt"] < 48e6


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(tmp_path, tokenizer, how):
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, str(tmp_path / "waiting.py"), str(tokenizer.files[0])]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        os.kill(parent.pid, how)
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert not alive


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_in_pieces_is_one_document(tmp_path, tokenizer, monkeypatch, workers):
    """Its ids are those of its pieces one after the other, bos and eos stand at its ends, others are around it."""
    monkeypatch.setattr(blocks, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(tokenization, "_POOL_BYTES", 0)
    monkeypatch.setattr(blocks.pieces, "__defaults__", (100,))
    text = "\ufeff" + "é" + CODE * 20
    for name, content in (("a.txt", "first"), ("b.txt", text), ("c.txt", ""), ("d.txt", "last")):
        (tmp_path / name).write_text(content)
    files = [tmp_path / f"{letter}.txt" for letter in "abcd"]
    summary = write_token_file(
        files, tmp_path / "x", tokenizer, SampleFormat("text", add_bos=True), workers=workers, progress=False
    )
    file = TokenFile(tmp_path / "x")
    cut = list(blocks.pieces(text[1:], 100))
    assert len(cut) > 20 and summary.empty == 1
    expected = [i for number, piece in enumerate(cut) for i in tokenizer.encode(piece, continues=number > 0)]
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert [file.document(n).tolist() for n in range(3)] == [
        [bos, *tokenizer.encode("first"), eos], [bos, *expected, eos], [bos, *tokenizer.encode("last"), eos],
    ]  # fmt: skip
    assert len(file) == 3


def test_a_text_that_is_not_utf8_near_its_end_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(blocks.pieces, "__defaults__", (100,))
    (tmp_path / "a.txt").write_bytes(b"abc de\n" * 99 + b"\xc3")
    (tmp_path / "b.txt").write_text("good")
    summary = write_token_file(
        [tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "x", tokenizer, SampleFormat("text"), on_error="skip",
        progress=False,
    )  # fmt: skip
    assert summary.problems.shown == [
        f"{tmp_path}/a.txt: not UTF-8: byte 0xc3 at offset 693, line 100 (unexpected end of data)"
    ]
    assert len(TokenFile(tmp_path / "x")) == 1
