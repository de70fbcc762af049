"""Tokenizers behind one small interface, and the identity by which artefacts recognise their tokenizer.

Two tokenizers are the same when every id stands for the same bytes (`fingerprint`); file names, file formats and
libraries do not count. `encode` never adds bos or eos: whoever builds a sample decides that, in the open.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from megakd.errors import DataError


class Tokenizer(Protocol):
    """What the rest of megakd asks of a tokenizer.

    Attributes:
        kind: which library's format `files` are in, as in a checkpoint's `tokenizer.kind`.
        files: the files that must travel with a checkpoint, all in one folder, the one to load first.
        vocab_size: number of ids; every id is in [0, vocab_size).
        bos_id, eos_id, pad_id: special ids, None where the tokenizer has none.
        chat_template: the Jinja template that came with it, None without one.
        named_tokens: texts of its special tokens by the names that chat templates use (`bos_token`, `eos_token`, ...).
        special_texts: texts that `encode(special=True)` makes one token each, wherever they stand.
        fingerprint: hexadecimal identity of the id -> bytes map (`fingerprint_of`).
    """

    kind: str
    files: list[Path]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None
    named_tokens: dict[str, str]
    special_texts: list[str]
    fingerprint: str

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """Ids of `text`, without bos or eos.

        Args:
            special: names of special tokens in the text become those tokens; else they are plain text.
            continues: the text continues another one, so a tokenizer that puts a space before every text puts none.
        """

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text, special=True)` as transformers does it, and for each id the characters [start, stop) it holds.

        Raises:
            DataError: the tokenizer changes texts, so that which id holds which text cannot be told.
        """

    def check_chat(self) -> None:
        """Raise a DataError if transformers makes other ids of a text with special tokens in it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text; for a special token its name."""

    def is_special(self, token_id: int) -> bool:
        """Whether an id stands for no text: bos, eos, pad, unknown, reserved."""


def fingerprint_of(entries: Iterable[tuple[bool, bytes]]) -> str:
    """Hash an id -> bytes map.

    Args:
        entries: (is it special, its bytes) of ids 0, 1, 2, ... in order.

    Returns:
        SHA-256 in hexadecimal over one record an id: `S` or `T`, the length as 4 little-endian bytes, the bytes.
    """
    digest = hashlib.sha256()
    for special, piece in entries:
        digest.update((b"S" if special else b"T") + len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()


_MARKS = ("\x00", "\n", "|", "a")


def encode_continuation(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text that continues another one, from a tokenizer that puts a space before every text.

    A mark is put before the text and its ids are taken off again; a mark qualifies if its ids spell it and stay the
    same with the text behind it.
    """
    for mark in _MARKS:
        prefix, ids = (tokenizer.encode(x, special=special) for x in (mark, mark + text))
        spelled = b"".join(map(tokenizer.id_to_bytes, prefix)).lstrip(b" ")
        if spelled == mark.encode() and ids[: len(prefix)] == prefix:
            return ids[len(prefix) :]
    raise DataError(
        f"tokenizer {tokenizer.files[0]} cannot encode {text[:40]!r} as the continuation of a text",
        hint="use a tokenizer without normalisation, such as one trained by `megakd prepare tokenizer`",
    )


def spans_of_spelling(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """The characters [start, stop) of a text that each of its ids spells, for ids that spell it byte by byte.

    A space that the tokenizer has put before the text belongs to its first character.

    Raises:
        DataError: they do not.
    """
    pieces = [tokenizer.id_to_bytes(i) for i in ids]
    spelled, wanted = b"".join(pieces), text.encode()
    added = len(spelled) - len(wanted)
    if added not in (0, 1) or spelled[added:] != wanted or spelled[:added].strip():
        raise DataError(
            f"tokenizer {tokenizer.files[0]} changes the text {text[:40]!r}, so which of its tokens are an answer's "
            "cannot be told",
            hint="use a tokenizer without normalisation, or the tokenizer.json that transformers makes of it",
        )
    characters = [number for number, character in enumerate(text) for _ in character.encode()]
    spans, place = [], -added
    for piece in pieces:
        first, last = max(place, 0), max(place + len(piece) - 1, 0)
        spans.append((characters[first], characters[last] + 1) if piece else (0, 0))
        place += len(piece)
    return spans


def puts_space_first(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer adds something before a text that is not there."""
    return b"".join(map(tokenizer.id_to_bytes, tokenizer.encode("a"))) != b"a"
