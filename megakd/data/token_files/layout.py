"""Token files in Megatron's format: PREFIX.bin (tokens), PREFIX.idx (where each document starts), PREFIX.json (ours).

    PREFIX.bin   the tokens of all documents in a row, uint16 if the vocabulary is smaller than 65,500, else int32
    PREFIX.idx   "MMIDIDX\\0\\0"  uint64 version 1  uint8 type code  uint64 N  uint64 N+1
                 int32[N] tokens of each document  int64[N] their byte offsets in .bin  int64[N+1] 0, 1, ... N
    PREFIX.mask  only if not every token is supervised: uint8[tokens] 1 = supervised, int32[N] place of each document's
                 first supervised token after its first token, which nothing predicts (2,147,483,647: there is none)
    PREFIX.json  which tokenizer wrote the tokens, how many there are, how they were made; sizes and digests of the
                 parts above, and the digest of its own values

All little-endian. Megatron-Core's IndexedDataset reads what is written here and the other way round (tested). How the
parts get their names together, and where they are meanwhile: `megakd.data.token_files.publication`.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megakd.digests import KIND, FileDigests, sealed
from megakd.errors import DataError
from megakd.limits import parse_json

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
NEVER = np.iinfo(np.int32).max
FORMAT = 2  # 1 had no digests
AGAIN = "prepare the data again (of a raw file: remove these files, the next run makes them anew)"
DAMAGED = (
    f"the file is damaged, was copied incompletely, or is of another preparation: copy all of them again, or {AGAIN}"
)


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
        parts: what the files of the prefix held when they were written, by suffix; None in a description of format 1.
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
    parts: Mapping[str, FileDigests] | None = None
    format: int = FORMAT

    def record(self) -> dict:
        """The plain values of PREFIX.json."""
        values = {key: value for key, value in asdict(self).items() if key != "parts"}
        if self.parts is None:
            return values
        parts = {suffix: {"bytes": p.size_bytes, "digests": p.chunks} for suffix, p in sorted(self.parts.items())}
        return sealed(values | {"digests": KIND, "parts": parts})


def part(prefix: str | Path, suffix: str) -> Path:
    """The file of a prefix: PREFIX.bin, PREFIX.idx or PREFIX.json (a prefix may itself hold dots)."""
    return Path(f"{prefix}{suffix}")


def is_prefix(path: str | Path) -> bool:
    """Whether a path names a token file, rather than raw data."""
    return part(path, ".idx").exists() or (part(path, ".json").exists() and not Path(path).exists())


def write_info(path: Path, info: TokenFileInfo) -> None:
    path.write_text(json.dumps(info.record(), indent=1), encoding="utf-8")


def load_info(prefix: str | Path) -> TokenFileInfo:
    """Read PREFIX.json.

    Raises:
        DataError: it is missing, is not such a description, or not the one that was written.
    """
    path = part(prefix, ".json")
    try:
        record = parse_json(path.read_text(encoding="utf-8"), path, DataError)
        version = record["format"]
        if version > FORMAT:
            raise DataError(f"{path} has format {version}, this megakd reads up to {FORMAT}", hint="use a later megakd")
        if version == FORMAT:
            _check_seal(path, record)
            entries = record.pop("parts").items()
            record["parts"] = {suffix: FileDigests(entry["bytes"], entry["digests"]) for suffix, entry in entries}
            if record["parts"].keys() != {".bin", ".idx"} | ({".mask"} if record["masked"] else set()):
                raise ValueError(f"its parts are {', '.join(record['parts'])}")
            del record["digests"], record["digest"]
        return TokenFileInfo(**record)
    except FileNotFoundError as error:
        found = [suffix for suffix in (".bin", ".idx") if part(prefix, suffix).exists()]
        state = f"only {' and '.join(found)}: it was not finished, or not written by megakd" if found else "nothing"
        raise DataError(
            f"{path} does not exist ({state} at that prefix)",
            hint="prepare the data again; if Megatron or NeMo wrote it: `megakd prepare adopt PREFIX --tokenizer TOK`",
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="prepare the data again") from error


def _check_seal(path: Path, record: dict) -> None:
    if record["digest"] != sealed(record)["digest"]:
        raise DataError(f"{path} cannot be read: its values are not those that were written", hint=DAMAGED)
    if record["digests"] != KIND:
        raise DataError(f"{path} has digests of the kind {record['digests']}, this megakd knows {KIND}", hint=AGAIN)
