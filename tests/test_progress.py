"""Bars and log lines on one stderr: in a terminal of 80 columns, and in a file."""

import fcntl
import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from megakd import progress

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import logging, time
from megakd.progress import LogHandler, progress_bar
logging.basicConfig(format="%(levelname)s %(message)s", handlers=[LogHandler()], level="INFO")
with progress_bar(9, "short") as bar:
    bar.update(9)
bar = progress_bar(200, start=20)
for step in range(21, 61):
    time.sleep(0.02)
    bar.set_postfix_str("loss 4.123 kd 3.21 ce 4.101 agree 41.2% tok/s 12,345", refresh=step % 10 == 0)
    bar.update()
    if step == 40:
        logging.info("step 40: validation loss 4.1")
bar.close()
logging.info("done")
"""


def run_in_terminal(columns: int) -> str:
    """What a child writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # what Linux says at the end
        pass
    os.close(ours)
    assert child.wait() == 0
    return written.decode()


def test_a_terminal_shows_the_numbers_first_and_whole_log_lines():
    written = run_in_terminal(80)
    lines = [line.split("\r")[-1] for line in written.replace("\r\n", "\n").split("\n")]
    assert lines == ["INFO step 40: validation loss 4.1", "INFO done", ""], "bars are gone, log lines are whole"
    shown = [part for part in re.split(r"[\r\n]+", written) if "loss 4.123" in part]
    assert shown and all(len(part) <= 80 for part in shown)
    for part in shown:
        assert re.match(r"\d+/200 \|[^|]{10}\| \S+ left, loss 4\.123 kd 3\.21 ce 4\.101 agree 41\.2%", part), part


def test_a_file_gets_a_line_twice_a_minute_at_most(monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.progress_bar(100, "recording", start=10)
    for _ in range(90):
        clock[0] += 1.5
        bar.set_postfix_str("5 tok/s", refresh=True)
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4, lines
    assert lines[0] == "recording: 30/100 |###       | 01:45 left, 5 tok/s"
    assert lines[-1] == "recording: 90/100 |######### | 00:15 left, 5 tok/s"


@pytest.mark.parametrize("shown", [True, False])
def test_what_ends_within_half_a_minute_or_is_not_to_be_shown_leaves_nothing_in_a_file(capsys, shown):
    with progress.progress_bar(3_000_000, "verifying", unit="B", shown=shown) as bar:
        bar.update(3_000_000)
    assert capsys.readouterr().err == ""
