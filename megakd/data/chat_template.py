"""Jinja chat templates: a conversation as text, cut where the assistant's words begin and end.

A template with `{% generation %}` ... `{% endgeneration %}` says itself what the assistant writes. With any other, turn
n is what is added to the conversation before it, rendered with the generation prompt, by rendering it with turn n:

    rendered turns 1 ... n-1 and the generation prompt     what the model is given
    rendered turns 1 ... n, less the header below          what it is to have written at the end of its turn

White space after a special token that ends a turn is not part of it. A template that writes the assistant's next header
whether asked for it or not has it taken off. An earlier turn that is written differently once more follows (models
that think, whose thoughts are left out then) is not what the model would write there, so it is context.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension

from megakd.data.sandbox import BoundedEnvironment
from megakd.errors import DataError

_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters: no text holds them
_REFUSALS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
    MemoryError,
)  # fmt: skip
_QUESTION = {"role": "user", "content": "x"}
REWRITTEN = "assistant's turns that the chat template writes differently once more follows are not learnt"


class BadRecord(ValueError):
    """A record that cannot become a sample; the message says why."""


class Segment(NamedTuple):
    """A part of a sample's text, and whether its tokens are supervised."""

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

    Templates see `messages`, `tools`, `documents` (none), `add_generation_prompt`, the tokenizer's named tokens
    (`bos_token`, `eos_token`, ...), their arguments, the function `raise_exception` and the filter `tojson`; not the
    clock (no `strftime_now`), so a text is the same tomorrow.

    Args:
        source: the template.
        named_tokens: texts of the tokenizer's tokens by name, as `Tokenizer.named_tokens`.
        special_texts: texts that are one token each, as `Tokenizer.special_texts`.
        arguments: what else the template sees.

    Raises:
        DataError: the template cannot be parsed, or does not mention an argument.
    """

    def __init__(
        self,
        source: str,
        named_tokens: Mapping[str, str],
        special_texts: Sequence[str] = (),
        arguments: Mapping | None = None,
    ):
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
            self._keys = set(_keys(parsed))
            self._words = self._keys | {node.name for node in parsed.find_all(jinja2.nodes.Name)}
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise DataError(f"the chat template cannot be parsed: {error}", hint="see data.chat_template") from error
        self._names, self._arguments = dict(named_tokens), dict(arguments or {})
        longest_first = sorted(special_texts, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marks_itself = "endgeneration" in source
        if unknown := [name for name in self._arguments if not self.mentions(name)]:
            raise DataError(
                f"the chat template does not use {', '.join(unknown)} of data.chat_template_kwargs",
                hint="leave it out, or correct its name",
            )

    def mentions(self, name: str) -> bool:
        """Whether a name or key stands anywhere in the template."""
        return name in self._words

    def reads_key(self, name: str) -> bool:
        """Whether the template takes something by this key, as in `part.text` and `part["text"]`."""
        return name in self._keys

    def segments(
        self,
        messages: list[dict],
        learnt: Sequence[bool],
        tools: list | None = None,
        arguments: Mapping | None = None,
    ) -> tuple[list[Segment], list[str]]:
        """A conversation as segments whose texts make up the rendered conversation, and what of it got lost.

        Args:
            messages: the turns, as the template sees them.
            learnt: for each turn whether it is to be supervised; only turns of the assistant can be.
            tools, arguments: given to the template; these arguments come before those of the template.

        Raises:
            BadRecord: the template refuses the conversation, or where a turn begins or ends cannot be told.
        """
        render = _Rendering(self._template, {"tools": tools, **self._names, **self._arguments, **(arguments or {})})
        text = render(messages)
        if self._marks_itself:
            segments, notes = list(_cut_at_marks(text, messages, learnt)), []
        else:
            segments, notes = self._cut_at_prefixes(text, messages, learnt, render)
        segments = [segment for segment in segments if segment.text]
        if any(learnt) and not any(segment.supervised for segment in segments):
            raise BadRecord(f"nothing to learn from: {'; '.join(notes) or 'the chat template leaves every answer out'}")
        return segments, notes + list(_left_out("".join(segment.text for segment in segments), messages))

    def question(self, messages: list[dict], tools: list | None = None, arguments: Mapping | None = None) -> str:
        """The rendered conversation and the header under which the assistant is to answer; Args, Raises as above."""
        names = {"tools": tools, **self._names, **self._arguments, **(arguments or {})}
        text = _Rendering(self._template, names)(messages, add_generation_prompt=True)
        return text.replace(_BEGIN, "").replace(_END, "")

    def _cut_at_prefixes(self, text: str, messages, learnt, render) -> tuple[list[Segment], list[str]]:
        segments, place, notes = [], 0, []
        always_asked = _always_asked(messages, render)
        for number, wanted in enumerate(learnt):
            if not wanted:
                continue
            before = render(messages[:number], add_generation_prompt=True)
            after = render(messages[: number + 1])
            if not after.startswith(before) or len(before) < place:
                raise BadRecord(
                    f"the chat template renders turn {number + 1} differently when it is asked for and when it is "
                    "given, so what the assistant writes cannot be told; mark it in the template with "
                    "{% generation %} ... {% endgeneration %}"
                )
            if always_asked:
                after = self._without_header(before, after, messages, number, render)
            after = self._without_space(before, after)
            if not text.startswith(after):
                notes.append(REWRITTEN)
                continue
            segments += [Segment(text[place : len(before)], False), Segment(text[len(before) : len(after)], True)]
            place = len(after)
        segments.append(Segment(text[place:], False))
        return segments, notes

    def _without_header(self, before: str, after: str, messages, number: int, render) -> str:
        """`after` up to where the next header begins, if it has one though the answer is the last turn."""
        following = messages[number + 1] if number + 1 < len(messages) else _QUESTION
        more = render([*messages[: number + 1], following])
        if more.startswith(after):
            return after
        answer = after[len(before) :]
        header = self._header_alone(answer, render)
        if header is None:
            header = self._header_of_another(before, answer, more[len(before) :])
        if not before.endswith(header):
            raise BadRecord(
                f"the chat template writes {header[:60]!r} after turn {number + 1}, but not before it, so where the "
                "turn ends cannot be told; mark it in the template with {% generation %}"
            )
        return after[: len(after) - len(header)]

    def _header_alone(self, answer: str, render) -> str | None:
        """The header as it stands behind an empty conversation; None if the template refuses that."""
        try:
            header = self._common_end(render([]), answer)
        except BadRecord:
            return None
        return header if header.strip() else None

    def _header_of_another(self, before: str, answer: str, more: str) -> str:
        """The header, from where an answer at the end and one that is followed by another's header differ.

        The headers begin alike. Where they begin with a special token, it is the last that both texts have, behind the
        one that ends the turn; else they begin behind the last.
        """
        shared = answer[: _common_beginning(answer, more)]
        special = [match for match in self._special.finditer(answer) if match.end() <= len(shared)]
        if not special:
            raise BadRecord(
                "the chat template writes something behind the last turn though no answer is asked for, and nothing "
                "tells it from the turn's end; mark what the assistant writes with {% generation %}"
            )
        last = special[-1]
        begins = len(special) > 1 and last.end() == len(shared) and before.endswith(answer[last.start() :])
        return answer[last.start() if begins else last.end() :].lstrip()

    def _without_space(self, before: str, after: str) -> str:
        """`after` without the white space behind a special token that ends it."""
        ending = after.rstrip()
        ends_in_token = any(match.end() == len(ending) for match in self._special.finditer(ending))
        return ending if ends_in_token and len(ending) > len(before) else after

    def _common_end(self, one: str, other: str) -> str:
        """The longest common ending of two texts that does not begin inside a special token."""
        length = 0
        for a, b in zip(reversed(self._atoms(one)), reversed(self._atoms(other)), strict=False):
            if a != b:
                break
            length += len(a)
        return one[len(one) - length :]

    def _atoms(self, text: str) -> list[str]:
        return re.findall(f"{self._special.pattern}|.", text, re.DOTALL)


def _common_beginning(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _always_asked(messages: list[dict], render) -> bool:
    """Whether a template writes the same behind a question whether an answer is asked for or not."""
    questions = [number for number, message in enumerate(messages, 1) if message["role"] == "user"]
    question = messages[: questions[-1]] if questions else [_QUESTION]
    return render(question) == render(question, add_generation_prompt=True)


class _Rendering:
    """A template with everything it sees but the messages."""

    def __init__(self, template, names: dict):
        self._template, self._names = template, names

    def __call__(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        names = {"messages": messages, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.environment.render(self._template, **{**self._names, **names})
        except _REFUSALS as error:
            reason = str(error) or type(error).__name__
            raise BadRecord(f"the chat template refuses the conversation: {reason}") from error


def _cut_at_marks(text: str, messages: list[dict], learnt: Sequence[bool]) -> Iterator[Segment]:
    """Segments of a text whose template marks what the assistant writes; turns not to be learnt lose their mark."""
    before, *marked = text.split(_BEGIN)
    wanted = [want for want, message in zip(learnt, messages, strict=True) if message["role"] == "assistant"]
    if len(marked) != len(wanted):
        if any(wanted) and not all(wanted):
            raise BadRecord(
                f"the chat template marks {len(marked)} texts as the assistant's in a conversation with {len(wanted)} "
                "such turns, so those that are not to be learnt cannot be told"
            )
        wanted = [any(wanted)] * len(marked)
    yield Segment(before, False)
    for part, want in zip(marked, wanted, strict=True):
        written, mark, after = part.partition(_END)
        if not mark or _END in after:
            raise BadRecord("{% generation %} blocks inside each other, or U+FDD0 or U+FDD1 in a text")
        yield Segment(written, want)
        yield Segment(after, False)


def _left_out(text: str, messages: list[dict]) -> Iterator[str]:
    """Whose turns have a content that is not in the rendered text."""
    for role in dict.fromkeys(message["role"] for message in messages):
        contents = [m["content"] for m in messages if m["role"] == role and isinstance(m.get("content"), str)]
        if not all(content.strip() in text for content in contents):
            yield f"the chat template leaves out or changes what turns of the {role} say"


def _keys(template: jinja2.nodes.Template) -> Iterator[str]:
    """Attributes and text constants of a parsed template."""
    for node in template.find_all((jinja2.nodes.Getattr, jinja2.nodes.Const)):
        key = node.attr if isinstance(node, jinja2.nodes.Getattr) else node.value
        if isinstance(key, str):
            yield key


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str):
    raise jinja2.TemplateError(message)
