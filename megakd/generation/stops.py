"""What ends a sequence: a token, a text, or its length."""

import dataclasses
from collections.abc import Sequence as Listed

from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import ConfigError

SLACK_TOKENS = 8  # before a stop text: tokens that add nothing to the text, and what a text's beginning loses


@dataclasses.dataclass(frozen=True)
class Stops:
    """What ends a sequence.

    Attributes:
        tokenizer: of the model.
        ids: tokens that end it; they stay among its ids, and are not in its text.
        texts: that end it; their tokens stay among its ids, and its text ends before them.
    """

    tokenizer: Tokenizer
    ids: frozenset[int]
    texts: tuple[str, ...] = ()

    def apply(self, sequence, max_new_tokens: int) -> None:
        """Give a sequence that its last token has ended its reason, stop and text."""
        ids, last = sequence.ids, sequence.ids[-1]
        if last in self.ids:
            sequence.reason, sequence.stop = "stop", last
            sequence.text = self.tokenizer.decode(ids[:-1])
        elif found := self._text_in(ids):
            sequence.reason, sequence.stop = "stop", found
            text = self.tokenizer.decode(ids)
            sequence.text = text[: text.find(found)]
        elif len(ids) == max_new_tokens:
            sequence.reason, sequence.text = "length", self.tokenizer.decode(ids)

    def _text_in(self, ids: list[int]) -> str | None:
        """The stop text that the last token has completed; of several, the one that begins first."""
        if not self.texts:
            return None
        most = max(len(text.encode()) for text in self.texts) + SLACK_TOKENS  # a token adds a byte or more
        tail = self.tokenizer.decode(ids[-most:])
        places = {text: tail.find(text) for text in self.texts}
        found = [text for text in self.texts if places[text] >= 0]
        return min(found, key=places.__getitem__, default=None)


def build_stops(
    tokenizer: Tokenizer, tokens: Listed[str], texts: Listed[str], *, ignore_eos: bool = False,
    names: tuple[str, str] = ("--stop-token", "--stop"),
) -> Stops:  # fmt: skip
    """The stops that a user names, and the tokenizer's eos.

    Args:
        tokens: ids, or texts that are one token each.
        texts: not empty.
        ignore_eos: leave the eos out.
        names: what the user has given tokens and texts by.
    Raises:
        ConfigError: a token is unknown, or a text is empty.
    """
    ids = set() if ignore_eos or tokenizer.eos_id is None else {tokenizer.eos_id}
    for name in tokens:
        found = [int(name)] if name.isdecimal() else tokenizer.encode(name, special=True, continues=True)
        if len(found) != 1 or not 0 <= found[0] < tokenizer.vocab_size:
            raise ConfigError(
                f"{names[0]} {name} is no token of {tokenizer.files[0]}: {len(found)} tokens make it up"
                if not name.isdecimal()
                else f"{names[0]} {name} is no id of {tokenizer.files[0]}, which has {tokenizer.vocab_size}",
                hint=f"name one token, such as <|im_end|>, or its id; {names[1]} takes any text",
            )
        ids |= set(found)
    if "" in texts:
        raise ConfigError(f"{names[1]} is empty, which every text contains", hint="leave it out")
    return Stops(tokenizer, frozenset(ids), tuple(texts))
