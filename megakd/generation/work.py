"""Which completions a model has to write: the prompts of an input, cut over shards and data-parallel ranks."""

import dataclasses
import itertools
import pathlib
from collections import Counter
from collections.abc import Iterator, Set

from megakd.data.blocks import read_blocks
from megakd.data.chat_template import BadRecord
from megakd.data.formats import SampleFormat
from megakd.data.prompts import Prompt, build_prompter
from megakd.data.records import Problems, records_of
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError
from megakd.generation.engine import Request


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of an input; a prompt's number counts all records of the input, from 0.

    Attributes:
        files: in the order of their records.
        sample_format: of the records.
        tokenizer: of the model.
        limit: records that are used, from the first on; None: all.
    """

    files: tuple[pathlib.Path, ...]
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


@dataclasses.dataclass
class Work:
    """What one model is to write.

    Attributes:
        prompts: of the input.
        numbers: of those that are this model's.
        completions: of each prompt.
        done: numbers (prompt * completions + completion) of what is there already.
        most_tokens: of a prompt.
        texts: of the prompts under way, and how many of their completions are still to come.
        skipped: reasons, and how many prompts each has cost.
    """

    prompts: Prompts
    numbers: range
    completions: int
    done: Set[int]
    most_tokens: int
    texts: dict[int, list] = dataclasses.field(default_factory=dict)
    skipped: Counter = dataclasses.field(default_factory=Counter)

    def requests(self) -> Iterator[Request]:
        """Those that are left, a prompt's completions one after the other; prompts that do not fit are counted."""
        for number, prompt in self.prompts.of(self.numbers):
            if not prompt.ids:
                self.skipped["prompts without a token"] += 1
                continue
            if len(prompt.ids) > self.most_tokens:
                self.skipped[f"prompts of more than {self.most_tokens:,} tokens, which leave no room"] += 1
                continue
            first = number * self.completions
            missing = [c for c in range(self.completions) if first + c not in self.done]
            if missing:
                self.texts[number] = [prompt.text, len(missing)]
            for completion in missing:
                yield Request(number, completion, tuple(prompt.ids))

    def text_of(self, prompt: int) -> str:
        """Of the prompt of a completion that is finished; to be asked once for each."""
        entry = self.texts[prompt]
        entry[1] -= 1
        return (self.texts.pop(prompt) if entry[1] == 0 else entry)[0]


def share(total: int, shard: tuple[int, int], rank: int, ranks: int) -> range:
    """The numbers below `total` that are one data-parallel rank's of one shard (its number and how many there are)."""
    index, shards = shard
    return range(index + shards * rank, total, shards * ranks)
