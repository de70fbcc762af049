"""What records mean: each format as a list of segments, supervised or not.

text              {"text"}                                         everything is supervised
prompt_response   {"input", "output"} or {"prompt", "completion"}  the output
alpaca            {"instruction", "input"?, "output"}              the output
nemo_chat         {"system", "conversations": [{"from", "value", "label"?}], "mask", "type"}
messages          {"messages": [{"role", "content"}]}, and other conversations (see `conversations`)
                                                                   what the assistant writes
ids               {"prompt_ids", "completion_ids"}, as `megakd generate` writes them; nothing is tokenized
                                                                   the completion
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from megakd.data.chat_template import BadRecord, ChatTemplate, Segment
from megakd.data.conversations import flatten_parts, instruction_of, is_sharegpt, read_conversation, unused_by
from megakd.data.fields import Fields
from megakd.data.ids import ids_segments
from megakd.data.nemo_chat import ChatTokens, nemo_chat_segments
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError

FORMATS = ("text", "prompt_response", "alpaca", "nemo_chat", "messages", "ids")
TEMPLATED = ("prompt_response", "alpaca")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class SampleFormat:
    """How records become samples; equal formats of equal records with one tokenizer give equal tokens.

    Attributes:
        name: one of FORMATS.
        template: text of a prompt_response or alpaca sample; ends with {output}, other names in braces are keys of the
            record; for alpaca {input} is the instruction with its input, unless {instruction} is there too.
        columns: for a name used here, the key that the records use instead.
        chat_template: Jinja source for messages; None is the tokenizer's own.
        chat_template_kwargs: what else the template sees.
        chat_tokens: the strings around NeMo's turns.
        answer_only_loss: supervise the answers only; else every token.
        add_bos, add_eos: put the tokenizer's bos before, its eos after a sample; not for the chat formats, whose
            templates say what is there.
        strict: a record of which something is not used cannot be used.
        truncation: "end": samples keep their length; "left", "right": one of more than `most_tokens` loses tokens on
            that side of the text of `truncation_field`.
    """

    name: str
    template: str = "{input} {output}"
    columns: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    chat_template_kwargs: Mapping = field(default_factory=dict)
    chat_tokens: ChatTokens = field(default_factory=ChatTokens)
    answer_only_loss: bool = True
    add_bos: bool = False
    add_eos: bool = True
    strict: bool = False
    truncation: str = "end"
    truncation_field: str = "input"
    most_tokens: int | None = None

    @property
    def has_ends(self) -> bool:
        """Whether bos and eos stand around a sample as `add_bos` and `add_eos` say."""
        return self.name in ("text", *TEMPLATED)

    def relevant(self, tokenizer: Tokenizer) -> dict:
        """The choices that matter to this format, as JSON: what its tokens depend on beside records and tokenizer."""
        choices = {"name": self.name, "columns": dict(self.columns), "answer_only_loss": self.answer_only_loss}
        choices["strict"] = self.strict
        if self.has_ends:
            choices |= {"bos": tokenizer.bos_id if self.add_bos else None}
            choices |= {"eos": tokenizer.eos_id if self.add_eos else None}
        if self.name in TEMPLATED:
            choices["template"] = self.template
        if self.truncation != "end":
            choices["truncation"] = [self.truncation, self.truncation_field, self.most_tokens]
        if self.name == "nemo_chat":
            choices["chat_tokens"] = asdict(self.chat_tokens)
        if self.name == "messages":
            choices["chat_template"] = self.chat_template or tokenizer.chat_template
            choices["chat_template_kwargs"] = dict(self.chat_template_kwargs)
            choices["named_tokens"] = dict(tokenizer.named_tokens)
        return choices


class Sample(NamedTuple):
    """A record as text.

    Attributes:
        segments: what makes it up.
        notes: what of the record is not in them.
        shortened: where in the first segment the text is that `truncation_field` names.
        ids: of the segments, in place of their texts; None: the texts are to be encoded.
    """

    segments: list[Segment]
    notes: list[str]
    shortened: range = range(0)
    ids: tuple[list[int], ...] | None = None


def detect_format(record: dict, columns: Mapping[str, str], where: str) -> str:
    """The format that a record's keys show.

    Raises:
        DataError: they show none.
    """
    keys = set(record) | set(columns)
    fields = Fields(record, columns)
    if "completion_ids" in keys:
        return "ids"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        chat = "mask" not in keys and is_sharegpt(fields.get("conversations"))
        return "messages" if chat else "nemo_chat"
    if keys & {"output", "completion"}:
        if "instruction" in keys and "instruction" not in columns.values():
            return "alpaca"
        if isinstance(fields.get("prompt"), list):
            return "messages"
        if keys & {"input", "prompt"}:
            return "prompt_response"
    if "text" in keys:
        return "text"
    raise DataError(
        f"{where}: the keys {', '.join(sorted(map(str, record))) or '(none)'} show none of the formats "
        f"{', '.join(FORMATS)}",
        hint='rename keys with data.columns, as in {"input": "question", "output": "answer"}',
    )


def build_formatter(sample_format: SampleFormat, tokenizer: Tokenizer) -> Callable[[dict], Sample]:
    """The function that turns a record into a sample; it raises BadRecord.

    Raises:
        DataError: the template has no {output} at its end, there is no chat template, it cannot be parsed, or it does
            not use an argument.
    """
    if sample_format.name in TEMPLATED:
        field = None if sample_format.truncation == "end" else sample_format.truncation_field
        read = _templated(sample_format.template, alpaca=sample_format.name == "alpaca", shortened=field)
    elif sample_format.name == "messages":
        read = _messages(chat_template_of(sample_format, tokenizer), sample_format.answer_only_loss)
    elif sample_format.name == "ids":
        read = lambda fields: _ids(fields, tokenizer)  # noqa: E731
    elif sample_format.name == "nemo_chat":
        read = lambda fields: Sample(nemo_chat_segments(fields, sample_format.chat_tokens), [])  # noqa: E731
    elif sample_format.name == "text":
        read = lambda fields: Sample([Segment(fields.text("text"), True)], [])  # noqa: E731
    else:
        raise DataError(f"unknown format {sample_format.name!r}", hint=f"one of {', '.join(FORMATS)}")

    def formatted(record: dict) -> Sample:
        fields = Fields(record, sample_format.columns)
        segments, notes, shortened, ids = read(fields)
        notes = [*notes, *(f'text under "{key}" is not used' for key in fields.unused())]
        if sample_format.strict and notes:
            raise BadRecord(f"{'; '.join(notes)} (data.strict)")
        if not sample_format.answer_only_loss:
            return Sample([Segment(segment.text, True) for segment in segments], notes, shortened, ids)
        if not any(segment.supervised for segment in segments):
            raise BadRecord("nothing to learn from: no turn of the conversation is supervised")
        return Sample(segments, notes, shortened, ids)

    return formatted


def check_format(sample_format: SampleFormat, tokenizer: Tokenizer) -> None:
    """Raise a DataError if the tokenizer lacks what the format asks for, or a mapped column is none of the format's."""
    for wanted, token_id, name in (
        (sample_format.add_bos, tokenizer.bos_id, "bos"),
        (sample_format.add_eos, tokenizer.eos_id, "eos"),
    ):
        if wanted and token_id is None and sample_format.has_ends:
            raise DataError(
                f"tokenizer {tokenizer.files[0]} has no {name}, and data.add_{name} is true",
                hint=f"data.add_{name}=false, or name the token in the tokenizer's settings",
            )
    build_formatter(sample_format, tokenizer)
    known = _names_of(sample_format)
    if unknown := [name for name in sample_format.columns if name not in known]:
        raise DataError(
            f"data.columns names {', '.join(unknown)}, which {sample_format.name} does not read",
            hint=f"{sample_format.name} reads {', '.join(sorted(known))}",
        )
    if sample_format.truncation != "end" and sample_format.name not in TEMPLATED:
        raise DataError(
            f"data.truncation is {sample_format.truncation}, and samples of {sample_format.name} are cut at their end",
            hint=f"data.truncation=end; only {' and '.join(TEMPLATED)} have a prompt of which a part can be left out",
        )
    if sample_format.name == "messages":
        tokenizer.check_chat()


def texts_of(record: dict) -> list[str]:
    """The texts of a record of any format, to train a tokenizer on; none if it has no known key with a text."""
    keys = ("text", "system", "instruction", "input", "prompt", "output", "completion")
    texts = [record.get(key) for key in keys]
    for name in ("messages", "conversations", "prompt", "completion"):
        turns = record.get(name)
        for turn in turns if isinstance(turns, list) else []:
            for content in (turn.get("content"), turn.get("value")) if isinstance(turn, dict) else ():
                texts.append(content)
                if isinstance(content, list):
                    texts += [part.get("text") for part in content if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]


def _names_of(sample_format: SampleFormat) -> set[str]:
    """The names that a format reads from a record."""
    conversation = {"messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system",
                    "tools", "chat_template_kwargs"}  # fmt: skip
    pair = {"input", "prompt", "output", "completion", *_PLACEHOLDER.findall(sample_format.template)}
    return {
        "text": {"text"},
        "prompt_response": pair,
        "alpaca": pair | {"instruction"},
        "nemo_chat": {"conversations", "system", "mask", "type"},
        "messages": conversation,
        "ids": {"prompt_ids", "completion_ids"},
    }[sample_format.name]


def _ids(fields: Fields, tokenizer: Tokenizer) -> Sample:
    segments, ids = ids_segments(fields, tokenizer)
    return Sample(segments, [], ids=ids)


def _templated(template: str, *, alpaca: bool, shortened: str | None) -> Callable[[Fields], Sample]:
    before, texts = split_template(template)
    prompt = before.rstrip(" ")
    if shortened not in (None, *texts[1::2]):
        raise DataError(
            f"data.truncation_field is {shortened}, which is not in the prompt of the template {template!r}",
            hint=f"name one of {', '.join(texts[1::2]) or 'its names in braces; it has none'}",
        )
    names = texts[1::2]

    def segments(fields: Fields) -> Sample:
        answer, asked, part = before[len(prompt) :] + value_of(fields, "output", names, alpaca), "", range(0)
        for number, text in enumerate(texts):
            filled = value_of(fields, text, names, alpaca) if number % 2 else text
            if number % 2 and text == shortened:
                part = range(len(asked), len(asked) + len(filled))
            asked += filled
        return Sample([Segment(text, learnt) for text, learnt in ((asked, False), (answer, True)) if text or learnt],
                      [], part)  # fmt: skip

    return segments


def split_template(template: str) -> tuple[str, list[str]]:
    """What a template has before {output}, and the prompt of it as text, name, text, name, ..., text.

    The spaces before an answer belong to it, as they do when a model writes it.

    Raises:
        DataError: it does not end with {output}.
    """
    before, output, after = template.rpartition("{output}")
    if not output or after:
        raise DataError(
            f"the template {template!r} does not end with {{output}}",
            hint='data.template is such as "{input} {output}" or "Q: {input}\\nA: {output}"',
        )
    return before, _PLACEHOLDER.split(before.rstrip(" "))


def value_of(fields: Fields, name: str, names: list[str], alpaca: bool) -> str:
    """What stands for a name of a template in a record; `names` are all those of its prompt."""
    if alpaca and name == "input":
        return fields.get("input") or "" if "instruction" in names else instruction_of(fields)
    alternative = {"input": "prompt", "output": "completion"}.get(name, name)
    return fields.text(fields.first_of(name, alternative))


def _messages(template: ChatTemplate, answer_only_loss: bool) -> Callable[[Fields], Sample]:
    def segments(fields: Fields) -> Sample:
        conversation = read_conversation(fields)
        messages = flatten_parts(template, conversation.messages)
        learnt = [answer_only_loss and answer for answer in conversation.learnt]  # else nothing has to be told apart
        made, notes = template.segments(messages, learnt, conversation.tools, conversation.arguments)
        return Sample(made, [*notes, *unused_by(template, conversation)])

    return segments


def chat_template_of(sample_format: SampleFormat, tokenizer: Tokenizer) -> ChatTemplate:
    source = sample_format.chat_template or tokenizer.chat_template
    if source is None:
        raise DataError(
            f"no chat template: data.chat_template is not given and tokenizer {tokenizer.files[0]} has none",
            hint="data.chat_template is a Jinja template or a file with one",
        )
    return ChatTemplate(source, tokenizer.named_tokens, tokenizer.special_texts, sample_format.chat_template_kwargs)
