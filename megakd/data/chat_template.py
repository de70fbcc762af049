"""Jinja chat templates: a conversation as text, cut where the assistant's words begin and end.

A template with `{% generation %}` ... `{% endgeneration %}` says itself what the assistant writes. Any other template
is rendered up to each assistant turn, with the generation prompt, and again with the turn: what is added is what the
assistant writes. The white space after the marker that ends a turn is not part of it.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension

from megakd.data.sandbox import BoundedEnvironment
from megakd.errors import DataError

_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters: no text holds them


class BadRecord(ValueError):
    """A record that cannot become a sample; the message says why."""


class Segment(NamedTuple):
    """A part of a sample's text that is encoded by itself, and whether its tokens are supervised."""

    text: str
    supervised: bool


class _Generation(Extension):
    """`{% generation %}`: marks the text inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return f"{_BEGIN}{caller()}{_END}"


class ChatTemplate:
    """A compiled template.

    Templates see `messages`, `tools`, `add_generation_prompt`, `bos_token`, `eos_token`, the function
    `raise_exception` and the filter `tojson`; not the clock (no `strftime_now`), so a text is the same tomorrow.

    Args:
        source: the template.
        special_names: `bos_token` and `eos_token`, "" where there is none.

    Raises:
        DataError: the template cannot be parsed.
    """

    def __init__(self, source: str, special_names: dict[str, str]):
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise DataError(f"the chat template cannot be parsed: {error}", hint="see data.chat_template") from error
        self._names = special_names
        self._marks_itself = "endgeneration" in source

    def segments(self, messages: list[dict], tools: list | None = None) -> list[Segment]:
        """A conversation as segments whose texts make up the rendered conversation.

        Raises:
            BadRecord: the template refuses the conversation, or renders its beginning differently once more follows.
        """
        if self._marks_itself:
            return [segment for segment in _cut_at_marks(self._render(messages, tools)) if segment.text]
        text = self._render(messages, tools)
        segments, place = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], tools, add_generation_prompt=True)
            after = self._render(messages[: number + 1], tools)
            end = len(before) + len(_written(after[len(before) :], message.get("content") or ""))
            if not (after.startswith(before) and text.startswith(after[:end]) and len(before) >= place):
                raise BadRecord(
                    f"the chat template renders turn {number + 1} differently when it is asked for and when it is "
                    "given, so what the assistant writes cannot be told; mark it in the template with "
                    "{% generation %} ... {% endgeneration %}"
                )
            segments += [Segment(text[place : len(before)], False), Segment(text[len(before) : end], True)]
            place = end
        segments.append(Segment(text[place:], False))
        return [segment for segment in segments if segment.text]

    def _render(self, messages: list[dict], tools: list | None, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.environment.render(
                self._template,
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise BadRecord(f"the chat template refuses the conversation: {reason}") from error


def _written(answer: str, content: str) -> str:
    """An assistant's turn without the white space after its end marker; all of it if there is no marker."""
    body = content.strip()
    marker = answer[max(0, answer.find(body)) + len(body) :].strip()
    return answer.rstrip() if marker else answer


def _cut_at_marks(text: str) -> Iterator[Segment]:
    before, *marked = text.split(_BEGIN)
    yield Segment(before, False)
    for part in marked:
        written, mark, after = part.partition(_END)
        if not mark or _END in after:
            raise BadRecord("{% generation %} blocks inside each other, or U+FDD0 or U+FDD1 in a text")
        yield Segment(written, True)
        yield Segment(after, False)


def _raise(message: str):
    raise jinja2.TemplateError(message)
