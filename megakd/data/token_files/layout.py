"""Token files in Megatron's format: PREFIX.bin (tokens), PREFIX.idx (where each document starts), PREFIX.json (ours).

    PREFIX.bin   the tokens of all documents in a row, uint16 if the vocabulary is smaller than 65,500, else int32
    PREFIX.idx   "MMIDIDX\\0\\0"  uint64 version 1  uint8 type code  uint64 N  uint64 N+1
                 int32[N] tokens of each document  int64[N] their byte offsets in .bin  int64[N+1] 0, 1, ... N
    PREFIX.mask  only if not every token is supervised: uint8[tokens] 1 = supervised, int32[N] place of each document's
                 first supervised token after its first token, which nothing predicts (2,147,483,647: there is none)
    PREFIX.json  which tokenizer wrote the tokens, how many there are, how they were made

All little-endian. Megatron-Core's IndexedDataset reads what is written here and the other way round (tested). The three
are written under another name, flushed, and renamed, PREFIX.json last: a prefix with its .json is whole.
"""

import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megakd.errors import DataError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
NEVER = np.iinfo(np.int32).max
DAMAGED = "the file is damaged or was copied incompletely: copy it again, or prepare the data again"


@dataclass(frozen=True)
class TokenFileInfo:
    """What PREFIX.json says about a token file.

    Attributes:
        tokenizer_fingerprint: identity of the tokenizer whose ids these are.
        vocab_size: number of its ids; every token is smaller.
        documents, tokens: how many (eos included).
        eos_appended: whether every document ends with the tokenizer's eos.
        content: BLAKE2b-128 of PREFIX.bin, hexadecimal.
        masked: whether there is a PREFIX.mask; documents are then samples of their own, not running text.
        supervised: tokens that are supervised.
        made_from: the format and its choices (`SampleFormat.relevant`); None if megakd did not tokenize.
        skipped: records of the input that were left out because they could not be used.
        format: version of this description.
    """

    tokenizer_fingerprint: str
    vocab_size: int
    documents: int
    tokens: int
    eos_appended: bool
    content: str
    masked: bool = False
    supervised: int = 0
    made_from: dict | None = None
    skipped: int = 0
    format: int = 1


def part(prefix: str | Path, suffix: str) -> Path:
    """The file of a prefix: PREFIX.bin, PREFIX.idx or PREFIX.json (a prefix may itself hold dots)."""
    return Path(f"{prefix}{suffix}")


def flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_info(path: Path, info: TokenFileInfo) -> None:
    """Write a description, through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(asdict(info), file, indent=1)
        flush(file)


def load_info(prefix: str | Path) -> TokenFileInfo:
    """Read PREFIX.json.

    Raises:
        DataError: it is missing or is not such a description.
    """
    path = part(prefix, ".json")
    try:
        return TokenFileInfo(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        found = [suffix for suffix in (".bin", ".idx") if part(prefix, suffix).exists()]
        state = f"only {' and '.join(found)}: it was not finished, or not written by megakd" if found else "nothing"
        raise DataError(
            f"{path} does not exist ({state} at that prefix)",
            hint="prepare the data again; if Megatron or NeMo wrote it: `megakd prepare adopt PREFIX --tokenizer TOK`",
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="prepare the data again") from error
