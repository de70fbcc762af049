"""Tokenizers behind one small interface, and the identity by which artefacts recognise their tokenizer.

Two tokenizers are the same when every id stands for the same bytes (`fingerprint`); file names, file formats and
libraries do not count. `encode` never adds bos or eos: whoever builds a sample decides that, in the open.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from megakd.errors import DataError

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Tokenizer(Protocol):
    """What the rest of megakd asks of a tokenizer.

    Attributes:
        kind: which library's format `files` are in, as in a checkpoint's `tokenizer.kind`.
        files: the files that must travel with a checkpoint, the one to load first.
        vocab_size: number of ids; every id is in [0, vocab_size).
        bos_id, eos_id, pad_id: special ids, None where the tokenizer has none.
        fingerprint: hexadecimal identity of the id -> bytes map (`fingerprint_of`).
    """

    kind: str
    files: list[Path]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos; special tokens spelled out in the text are plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on the library's own threads."""

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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a SentencePiece `.model` file.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing, unreadable, or not a tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"tokenizer {path} does not exist",
            hint="train one with `megakd prepare tokenizer`, or correct the path (data.tokenizer or --tokenizer)",
        )
    from megakd.data.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(path)
