"""Segments as ids and a mask.

Conversations are encoded whole, so their ids are those that transformers' `apply_chat_template` gives. The segments of
any other sample are encoded one by one, so that the border between a prompt and its answer is a border between tokens,
as it is when the model is asked the prompt.
"""

from typing import NamedTuple

import numpy as np

from megakd.data.blocks import pieces
from megakd.data.chat_template import BadRecord, Segment
from megakd.data.tokenizers.tokenizer import Tokenizer

STRADDLING = "tokens that hold text of an answer and of the chat template are not learnt"


class Ends(NamedTuple):
    """What stands around a sample's text: the tokenizer's bos before, its eos behind; None for nothing."""

    bos: int | None
    eos: int | None


def encode_in_parts(
    segments: list[Segment], tokenizer: Tokenizer, *, special: bool, ends: Ends, continues: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of segments that are encoded one by one, and for each whether it is supervised.

    A text of more than 262,144 characters is encoded in pieces, which libraries do faster; they are cut before a space
    between two words, where tokens end anyway.

    Args:
        special: names of special tokens in the text are these tokens.
        ends: eos is supervised, bos is not.
        continues: the segments continue another text.

    Raises:
        BadRecord: a text is no Unicode text (half a surrogate pair).
    """
    ids, masks = [], []

    def add(part, supervised: bool) -> None:
        ids.append(np.asarray(part, np.int32))
        masks.append(np.full(len(part), supervised))

    if ends.bos is not None:
        add([ends.bos], False)
    for number, segment in enumerate(segments):
        check_unicode(segment.text)
        for place, piece in enumerate(pieces(segment.text)):
            inside = continues or number + place > 0
            add(tokenizer.encode(piece, special=special, continues=inside), segment.supervised)
    if ends.eos is not None:
        add([ends.eos], True)
    return np.concatenate([*ids, np.zeros(0, np.int32)]), np.concatenate([*masks, np.zeros(0, bool)])


def encode_whole(segments: list[Segment], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ids of the text that segments make up, for each whether it is supervised, and what got lost.

    A token is supervised if all of its text is, or what is not is white space before text of the answer.

    Raises:
        BadRecord: a text is no Unicode text; which token holds which text cannot be told.
    """
    text = "".join(segment.text for segment in segments)
    check_unicode(text)
    ids, spans = tokenizer.encode_with_spans(text)
    starts, stops = np.asarray(spans, np.int64).reshape(-1, 2).T
    mask, notes = np.zeros(len(ids), bool), []
    for first, last in _supervised_ranges(segments):
        mask |= (first <= starts) & (starts < last) & (stops <= last)
        for token in np.flatnonzero((starts < last) & (stops > first) & ~mask):
            inside = text[max(first, starts[token]) : min(last, stops[token])]
            ends_inside, before = stops[token] <= last, text[starts[token] : first]
            mask[token] = ends_inside and not before.strip() and bool(inside.strip())
            if not mask[token] and inside.strip():
                notes = [STRADDLING]
    return np.asarray(ids, np.int32), mask, notes


def tokens_inside(prompt: str, part: range, tokenizer: Tokenizer) -> np.ndarray:
    """Which of the ids of a text that is encoded in one hold nothing but text of a part of it."""
    starts, stops = np.asarray(tokenizer.encode_with_spans(prompt)[1], np.int64).reshape(-1, 2).T
    return np.flatnonzero((starts >= part.start) & (stops <= part.stop) & (starts < part.stop))


def check_unicode(text: str) -> None:
    """Raise a BadRecord if a text holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise BadRecord(f"no Unicode text: {half} is half of a surrogate pair") from error


def _supervised_ranges(segments: list[Segment]) -> list[tuple[int, int]]:
    """Half-open ranges of characters; neighbours are one range."""
    ranges: list[tuple[int, int]] = []
    place = 0
    for segment in segments:
        end = place + len(segment.text)
        if segment.supervised and ranges and ranges[-1][1] == place:
            ranges[-1] = (ranges[-1][0], end)
        elif segment.supervised:
            ranges.append((place, end))
        place = end
    return ranges
