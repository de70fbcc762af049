"""The help is made from the schema and leaves nothing out."""

import re

import pytest

from megakd.config import Config, format_reference, section_summaries
from megakd.config.keys import iter_keys


def test_every_key_has_a_documentation_and_is_listed_with_type_and_default():
    text = format_reference(200)  # wide enough for all types on the line of their key
    for key in iter_keys(Config):
        assert key.doc.endswith((".", ")")), f"{key.name} has no docstring"
        line = next(line for line in text.splitlines() if line.split()[:1] == [key.name])
        assert line.endswith(key.expected) and (line.split()[1] == "required") == key.required
    assert re.search(r"^  optimizer\.lr +required +number > 0\n      Peak learning rate\.", text, re.M)
    assert re.search(r"^  run\.device += auto +auto, cuda or cpu$", text, re.M)


@pytest.mark.parametrize("width", [10, 80, 200])
def test_documentation_is_wrapped_to_the_terminal(width):
    lines = format_reference(width).splitlines()
    assert max(len(line) for line in lines if line.startswith("      ")) <= max(width, 60)
    assert width < 100 or max(map(len, lines)) <= width


def test_section_summaries_are_one_line_each():
    summaries = section_summaries()
    assert list(summaries) == list(Config.model_fields)
    assert all(text and "\n" not in text for text in summaries.values())
