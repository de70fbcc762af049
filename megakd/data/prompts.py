"""What a model is to go on from, of records of any format; answers that are there are left out.

text              all of it
prompt_response   the template up to {output}
alpaca            likewise
nemo_chat         everything before the last turn that is not masked
messages          the conversation up to the last answer, and the header of the answer, by the chat template
ids               prompt_ids
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megakd.data.blocks import read_blocks
from megakd.data.chat_template import BadRecord, Segment
from megakd.data.conversations import read_conversation
from megakd.data.encoding import Ends, check_unicode, encode_in_parts
from megakd.data.fields import Fields
from megakd.data.formats import (
    FORMATS,
    TEMPLATED,
    SampleFormat,
    chat_template_of,
    detect_format,
    flatten_parts,
    split_template,
    value_of,
)
from megakd.data.ids import read_ids
from megakd.data.nemo_chat import nemo_chat_segments
from megakd.data.records import Problems, records_of
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError


class Prompt(NamedTuple):
    """What a model goes on from.

    Attributes:
        text: for people.
        ids: of it.
    """

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Prompts:
    """The prompts of an input; a prompt's number counts all records of the input, from 0.

    Attributes:
        files: in the order of their records.
        sample_format: of the records.
        tokenizer: of the model.
        limit: records that are used, from the first on; None: all.
    """

    files: tuple[Path, ...]
    sample_format: SampleFormat
    tokenizer: Tokenizer
    limit: int | None = None

    def check(self, on_error: str) -> tuple[int, Problems]:
        """How many records there are, usable or not, and what is wrong with those that are not.

        Raises:
            DataError: there is none, or some cannot be used and `on_error` is `raise`.
        """
        problems, count, make = Problems(on_error), 0, build_prompter(self.sample_format, self.tokenizer)
        for where, record in self._records(problems):
            count += 1
            try:
                make(record)
            except (BadRecord, DataError) as error:
                problems.add(where, str(error).replace("\nhint: ", "; "))
        problems.check()
        if not count:
            raise DataError(f"{self.files[0]} holds no record", hint="the input is empty")
        return count, problems

    def read(self, on_error: str, most_tokens: int) -> tuple[dict[int, Prompt], Problems]:
        """The usable prompts by their numbers, and what is wrong with the others.

        Args:
            most_tokens: of a prompt.
        Raises:
            DataError: there is none, or some cannot be used and `on_error` is `raise`.
        """
        problems, found, make = Problems(on_error), {}, build_prompter(self.sample_format, self.tokenizer)
        for number, (where, record) in enumerate(self._records(problems)):
            try:
                found[number] = make(record)
            except (BadRecord, DataError) as error:
                problems.add(where, str(error).replace("\nhint: ", "; "))
                continue
            tokens = len(found[number].ids)
            if not 0 < tokens <= most_tokens:
                del found[number]
                problems.add(where, f"a prompt of {tokens:,} tokens; expected 1 to {most_tokens:,}")
        problems.check()
        if not found:
            seen = f"no prompt that can be used:\n{problems}" if problems.count else "no record"
            raise DataError(f"{self.files[0]} holds {seen}", hint="the input is empty" if not problems.count else None)
        return found, problems

    def of(self, wanted: Set[int] | range) -> Iterator[tuple[int, Prompt]]:
        """The prompts with some numbers, ascending; those of records that cannot be used are left out."""
        make = build_prompter(self.sample_format, self.tokenizer)
        for number, (_, record) in enumerate(self._records(Problems("skip"))):
            if number in wanted:
                try:
                    yield number, make(record)
                except (BadRecord, DataError):
                    continue  # `check` has named it

    def _records(self, problems: Problems) -> Iterator[tuple[str, dict]]:
        found = (item for block in read_blocks(self.files) for item in records_of(block, problems))
        return itertools.islice(found, self.limit)


def detect_prompts(files: list[Path], columns: Mapping[str, str]) -> str:
    """The format that the first record shows; answers may be missing.

    Raises:
        DataError: it shows none, or there is no record.
    """
    problems = Problems()
    for block in read_blocks(files, block_bytes=1 << 16):
        for where, record in records_of(block, problems):
            return prompt_format(record, columns, where)
        problems.check()
    raise DataError(f"{files[0]} holds no record", hint="the input is empty")


def prompt_format(record: dict, columns: Mapping[str, str], where: str) -> str:
    """The format of a record without its answer."""
    keys, fields = set(record) | set(columns), Fields(record, columns)
    if "prompt_ids" in keys:
        return "ids"
    if not keys & {"output", "completion", "messages", "conversations"}:
        if "instruction" in keys and "instruction" not in columns.values():
            return "alpaca"
        if keys & {"prompt", "input"}:
            return "messages" if isinstance(fields.get("prompt"), list) else "prompt_response"
    return detect_format(record, columns, where)


def build_prompter(sample_format: SampleFormat, tokenizer: Tokenizer) -> Callable[[dict], Prompt]:
    """The function that makes a prompt of a record; it raises BadRecord.

    Raises:
        DataError: as of `megakd.data.formats.build_formatter`.
    """
    read = _reader(sample_format, tokenizer)

    def prompt(record: dict) -> Prompt:
        made = read(Fields(record, sample_format.columns))
        if isinstance(made, Prompt):
            return made
        ends = Ends(tokenizer.bos_id if sample_format.has_ends and sample_format.add_bos else None, None)
        ids, _ = encode_in_parts(made, tokenizer, special=sample_format.name != "text", ends=ends)
        return Prompt("".join(segment.text for segment in made), ids.tolist())

    return prompt


def _reader(sample_format: SampleFormat, tokenizer: Tokenizer) -> Callable[[Fields], Prompt | list[Segment]]:
    name = sample_format.name
    if name in TEMPLATED:
        texts, alpaca = split_template(sample_format.template)[1], name == "alpaca"
        names = texts[1::2]

        def templated(fields: Fields) -> list[Segment]:
            filled = (value_of(fields, t, names, alpaca) if n % 2 else t for n, t in enumerate(texts))
            return [Segment("".join(filled), False)]

        return templated
    if name == "messages":
        tokenizer.check_chat()
        return _asker(sample_format, tokenizer)
    if name == "nemo_chat":
        return lambda fields: _before_the_answer(nemo_chat_segments(fields, sample_format.chat_tokens))
    if name == "ids":
        return lambda fields: Prompt(str(fields.get("prompt", "")), read_ids(fields, "prompt_ids", tokenizer))
    if name == "text":
        return lambda fields: [Segment(fields.text("text"), False)]
    raise DataError(f"unknown format {name!r}", hint=f"one of {', '.join(FORMATS)}")


def _asker(sample_format: SampleFormat, tokenizer: Tokenizer) -> Callable[[Fields], Prompt]:
    template = chat_template_of(sample_format, tokenizer)

    def ask(fields: Fields) -> Prompt:
        conversation = read_conversation(fields, answered=False)
        messages = flatten_parts(template, conversation.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadRecord("nobody asks anything: every turn is the assistant's")
        text = template.question(messages, conversation.tools, conversation.arguments)
        check_unicode(text)
        return Prompt(text, tokenizer.encode_with_spans(text)[0])

    return ask


def _before_the_answer(segments: list[Segment]) -> list[Segment]:
    last = max((number for number, segment in enumerate(segments) if segment.supervised), default=None)
    if last is None or any(segment.text.strip() for segment in segments[last + 1 :]):
        raise BadRecord("the last turn is masked, so whose answer is wanted cannot be told")
    return segments[:last]
