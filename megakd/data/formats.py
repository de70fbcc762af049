"""What records mean: each format as a list of segments, supervised or not.

    text              {"text"}                                         everything is supervised
    prompt_response   {"input", "output"} or {"prompt", "completion"}  the output
    nemo_chat         {"system", "conversations": [{"from", "value", "label"?}], "mask", "type"}
    messages          {"messages": [{"role", "content"}]}              what the assistant writes

Segments are encoded one by one, so the border between a prompt and its answer is a border between tokens, as it is when
the model is asked the prompt.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from megakd.data.chat_template import BadRecord, ChatTemplate, Segment
from megakd.data.nemo_chat import ChatTokens, nemo_chat_segments
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError

FORMATS = ("text", "prompt_response", "nemo_chat", "messages")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_ALTERNATIVES = {"input": "prompt", "output": "completion"}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class SampleFormat:
    """How records become samples; equal formats of equal records with one tokenizer give equal tokens.

    Attributes:
        name: one of FORMATS.
        template: prompt_response's text; ends with {output}, other names in braces are keys of the record.
        columns: for a name used here, the key that the records use instead.
        chat_template: Jinja source for messages; None is the tokenizer's own.
        chat_tokens: the strings around NeMo's turns.
        answer_only_loss: supervise the answers only; else every token.
        add_bos, add_eos: put the tokenizer's bos before, its eos after a sample; not for the chat formats, whose
            templates say what is there.
    """

    name: str
    template: str = "{input} {output}"
    columns: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    chat_tokens: ChatTokens = field(default_factory=ChatTokens)
    answer_only_loss: bool = True
    add_bos: bool = False
    add_eos: bool = True

    def relevant(self, tokenizer: Tokenizer) -> dict:
        """The choices that matter to this format, as JSON: what its tokens depend on beside records and tokenizer."""
        choices = {"name": self.name, "columns": dict(self.columns), "answer_only_loss": self.answer_only_loss}
        if self.name in ("text", "prompt_response"):
            choices |= {"add_bos": self.add_bos, "add_eos": self.add_eos}
        if self.name == "prompt_response":
            choices["template"] = self.template
        if self.name == "nemo_chat":
            choices["chat_tokens"] = asdict(self.chat_tokens)
        if self.name == "messages":
            choices["chat_template"] = self.chat_template or tokenizer.chat_template
        return choices


def detect_format(record: dict, columns: Mapping[str, str], where: str) -> str:
    """The format that a record's keys show.

    Raises:
        DataError: they show none.
    """
    keys = set(record) | set(columns)
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "nemo_chat"
    if keys & {"input", "prompt"} and keys & {"output", "completion"}:
        return "prompt_response"
    if "text" in keys:
        return "text"
    raise DataError(
        f"{where}: the keys {', '.join(sorted(map(str, record))) or '(none)'} show none of the formats "
        f"{', '.join(FORMATS)}",
        hint='rename keys with data.columns, as in {"input": "question", "output": "answer"}',
    )


def build_formatter(sample_format: SampleFormat, tokenizer: Tokenizer) -> Callable[[dict], list[Segment]]:
    """The function that turns a record into segments; it raises BadRecord.

    Raises:
        DataError: the template has no {output} at its end, there is no chat template, or it cannot be parsed.
    """
    columns = dict(sample_format.columns)
    if sample_format.name == "prompt_response":
        segments = _prompt_response(sample_format.template)
    elif sample_format.name == "messages":
        segments = _messages(_chat_template(sample_format, tokenizer))
    elif sample_format.name == "nemo_chat":
        segments = lambda record: nemo_chat_segments(record, sample_format.chat_tokens)  # noqa: E731
    else:
        segments = lambda record: [Segment(_string(record, "text"), True)]  # noqa: E731

    def formatted(record: dict) -> list[Segment]:
        renamed = {name: record[key] for name, key in columns.items() if key in record}
        made = segments({**record, **renamed})
        if not sample_format.answer_only_loss:
            return [Segment(segment.text, True) for segment in made]
        if not any(segment.supervised for segment in made):
            raise BadRecord("nothing to learn from: no turn of the conversation is supervised")
        return made

    return formatted


def encode_segments(
    segments: list[Segment], tokenizer: Tokenizer, sample_format: SampleFormat
) -> tuple[list[int], list[bool]]:
    """Ids of a sample and, for each, whether it is supervised.

    Names of special tokens in the text are these tokens, except in running text. eos is supervised, bos is not. A
    text of more than 262,144 characters is encoded in pieces, which libraries do faster; they are cut before a space
    between two words, where tokens end anyway.

    Raises:
        BadRecord: a text is no Unicode text (half a surrogate pair).
    """
    special, ends = sample_format.name != "text", sample_format.name in ("text", "prompt_response")
    ids: list[int] = [tokenizer.bos_id] if ends and sample_format.add_bos else []
    mask = [False] * len(ids)
    for number, segment in enumerate(segments):
        try:
            segment.text.encode()
        except UnicodeEncodeError as error:
            half = ascii(segment.text[error.start])
            raise BadRecord(f"no Unicode text: {half} is half of a surrogate pair") from error
        for place, piece in enumerate(_pieces(segment.text)):
            part = tokenizer.encode(piece, special=special, continues=number + place > 0)
            ids += part
            mask += [segment.supervised] * len(part)
    if ends and sample_format.add_eos:
        ids.append(tokenizer.eos_id)
        mask.append(True)
    return ids, mask


def _pieces(text: str, most: int = 1 << 18) -> Iterator[str]:
    """A text in pieces of at most `most` characters; if half of that holds no space between words, cut anywhere."""
    start = 0
    while len(text) - start > most:
        cut = text.rfind(" ", start + most // 2, start + most)
        while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind(" ", start + most // 2, cut)
        stop = cut if cut > 0 else start + most
        yield text[start:stop]
        start = stop
    yield text[start:]


def check_format(sample_format: SampleFormat, tokenizer: Tokenizer) -> None:
    """Raise a DataError if the tokenizer lacks what the format asks for."""
    for wanted, token_id, name in (
        (sample_format.add_bos, tokenizer.bos_id, "bos"),
        (sample_format.add_eos, tokenizer.eos_id, "eos"),
    ):
        if wanted and token_id is None and sample_format.name in ("text", "prompt_response"):
            raise DataError(
                f"tokenizer {tokenizer.files[0]} has no {name}, and data.add_{name} is true",
                hint=f"data.add_{name}=false, or name the token in the tokenizer's settings",
            )
    build_formatter(sample_format, tokenizer)


def texts_of(record: dict) -> list[str]:
    """The texts of a record of any format, to train a tokenizer on; none if it has no known key with a text."""
    texts = [record.get(key) for key in ("text", "system", "input", "prompt", "output", "completion")]
    for turns, key in (("messages", "content"), ("conversations", "value")):
        found = record.get(turns)
        texts += [turn.get(key) for turn in found if isinstance(turn, dict)] if isinstance(found, list) else []
    return [text for text in texts if isinstance(text, str)]


def _prompt_response(template: str) -> Callable[[dict], list[Segment]]:
    before, output, after = template.rpartition("{output}")
    if not output or after:
        raise DataError(
            f"the template {template!r} does not end with {{output}}",
            hint='data.template is such as "{input} {output}" or "Q: {input}\\nA: {output}"',
        )
    prompt = before.rstrip(" ")  # the spaces before an answer belong to it, as they do when a model writes it

    def segments(record: dict) -> list[Segment]:
        def fill(match: re.Match) -> str:
            return _string(record, match[1])

        answer = before[len(prompt) :] + _string(record, "output")
        made = [Segment(_PLACEHOLDER.sub(fill, prompt), False), Segment(answer, True)]
        return [segment for segment in made if segment.text or segment.supervised]

    return segments


def _messages(template: ChatTemplate) -> Callable[[dict], list[Segment]]:
    def segments(record: dict) -> list[Segment]:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRecord("empty conversation" if messages == [] else _missing(record, "messages", "a list"))
        for number, message in enumerate(messages, 1):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ROLES:
                raise BadRecord(f"turn {number}: unknown role {role!r} (known: {', '.join(ROLES)})")
            content = message.get("content")
            if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
                raise BadRecord(f'turn {number}: "content" is a {type(content).__name__}, not a string')
        return template.segments(messages, record.get("tools"))

    return segments


def _chat_template(sample_format: SampleFormat, tokenizer: Tokenizer) -> ChatTemplate:
    source = sample_format.chat_template or tokenizer.chat_template
    if source is None:
        raise DataError(
            f"no chat template: data.chat_template is not given and tokenizer {tokenizer.files[0]} has none",
            hint="data.chat_template is a Jinja template or a file with one",
        )
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return ChatTemplate(source, {n: "" if i is None else tokenizer.id_to_bytes(i).decode() for n, i in ids.items()})


def _string(record: dict, name: str) -> str:
    key = name if name in record else _ALTERNATIVES.get(name, name)
    value = record.get(key)
    if not isinstance(value, str):
        raise BadRecord(_missing(record, name if key not in record else key, "a string"))
    return value


def _missing(record: dict, key: str, wanted: str) -> str:
    if key in record:
        return f'"{key}" is a {type(record[key]).__name__}, not {wanted}'
    return f'no key "{key}" (found {", ".join(sorted(map(str, record))) or "an empty object"})'
