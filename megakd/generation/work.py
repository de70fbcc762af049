"""Which completions a model has to write: the prompts of an input, cut over shards and data-parallel ranks."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Set

from megakd.data.prompts import Prompts
from megakd.generation.engine import Request


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
