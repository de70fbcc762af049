"""Which kind of tokenizer a path holds, and that tokenizer loaded."""

import re
from pathlib import Path

from megakd.data.tokenizers.huggingface import HuggingFaceTokenizer
from megakd.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megakd.data.tokenizers.tiktoken import TiktokenTokenizer
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*$")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer; which kind it is shows in what the file holds.

    Args:
        path: a SentencePiece model; a `tokenizer.json` of Hugging Face, or a folder with one (or with a SentencePiece
            `tokenizer.model`); or a tiktoken file (lines of base64 and rank).

    Raises:
        DataError: missing, unreadable, or not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} does not exist",
            hint="train one with `megakd prepare tokenizer`, or correct the path (data.tokenizer or --tokenizer)",
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    with path.open("rb") as file:
        first_line = file.readline(1000)
    return (TiktokenTokenizer if _TIKTOKEN_LINE.match(first_line) else SentencePieceTokenizer)(path)


def _file_in(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"folder {folder} holds neither tokenizer.json nor tokenizer.model",
        hint="an old Hugging Face tokenizer (vocab.json and merges.txt) gets its tokenizer.json from "
        "`transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`",
    )
