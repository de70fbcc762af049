"""What an error quotes of strangers' files keeps to a length, and does nothing to the terminal that shows it."""

import pytest

from megakd.errors import LONGEST_LINE, MOST_LINES, CheckpointError, MegakdError, readable


def test_ordinary_messages_are_as_they_were_written():
    text = "/a/ä 文: 1 -> 2\n  optimizer.lr: was 0.1, is 0.2\n\tö\u00a0é " + "x" * (LONGEST_LINE - 40)
    assert readable(text) == text
    error = CheckpointError(text, hint="do it")
    assert str(error) == f"{text}\nhint: do it" and error.args == (text,)
    assert str(MegakdError("a")) == "a"


@pytest.mark.parametrize("length", [LONGEST_LINE + 1, 2_000, 10**6])
def test_a_long_line_keeps_its_ends(length):
    said = readable("first\nbegin" + "y" * (length - 8) + "end\nlast")
    first, line, last = said.split("\n")
    assert (first, last) == ("first", "last") and line.startswith("beginy") and line.endswith("yend")
    assert f"[... {length - 900:,} characters ...]" in line and len(line) <= LONGEST_LINE and readable(said) == said


def test_many_lines_keep_the_first_and_the_last():
    lines = [str(number) for number in range(MOST_LINES + 7)]
    said = readable("\n".join(lines))
    assert said.split("\n") == [*lines[:150], "[... 17 lines ...]", *lines[-40:]] and readable(said) == said


def test_a_terminal_is_not_steered():
    said = str(CheckpointError("a\x1b[2Jb\rc\udcffd\u202ee", hint="\x07"))
    assert said == "a\\x1b[2Jb\\rc\\udcffd\\u202ee\nhint: \\x07"
    said.encode()
    assert len(readable("\x00" * 10**5)) <= LONGEST_LINE
