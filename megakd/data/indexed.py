"""Token files in Megatron's format: PREFIX.bin (tokens), PREFIX.idx (where each document starts), PREFIX.json (ours).

    PREFIX.bin   the tokens of all documents in a row, uint16 if the vocabulary is smaller than 65,500, else int32
    PREFIX.idx   "MMIDIDX\\0\\0"  uint64 version 1  uint8 type code  uint64 N  uint64 N+1
                 int32[N] tokens of each document  int64[N] their byte offsets in .bin  int64[N+1] 0, 1, ... N
    PREFIX.json  which tokenizer wrote the tokens, how many there are, whether eos follows every document

All little-endian. Megatron-Core's IndexedDataset reads what is written here and the other way round (tested). The three
are written under another name, flushed, and renamed, PREFIX.json last: a prefix with its .json is whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megakd.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TokenFileInfo:
    """What PREFIX.json says about a token file.

    Attributes:
        tokenizer_fingerprint: identity of the tokenizer whose ids these are.
        vocab_size: number of its ids; every token is smaller.
        documents, tokens: how many (eos included).
        eos_appended: whether every document ends with the tokenizer's eos.
        content: BLAKE2b-128 of PREFIX.bin, hexadecimal.
        format: version of this description.
    """

    tokenizer_fingerprint: str
    vocab_size: int
    documents: int
    tokens: int
    eos_appended: bool
    content: str
    format: int = 1


def part(prefix: str | Path, suffix: str) -> Path:
    """The file of a prefix: PREFIX.bin, PREFIX.idx or PREFIX.json (a prefix may itself hold dots)."""
    return Path(f"{prefix}{suffix}")


class TokenFileWriter:
    """Writes one token file, document by document; nothing appears under PREFIX unless the `with` block ends well.

    Args:
        prefix: where to write; an older file of that name is replaced.
        tokenizer_fingerprint, vocab_size, eos_appended: as in `TokenFileInfo`.

    Raises:
        DataError: the disk is full or cannot be written, or no document was added.
    """

    def __init__(self, prefix: str | Path, *, tokenizer_fingerprint: str, vocab_size: int, eos_appended: bool):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
        self.tokens = 0
        self._described = dict(
            tokenizer_fingerprint=tokenizer_fingerprint, vocab_size=vocab_size, eos_appended=eos_appended
        )
        self._lengths = array("i")
        self._digest = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> "TokenFileWriter":
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._incomplete(".bin").open("wb")
        except OSError as error:
            raise self._explain(error) from error
        return self

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, ids) -> None:
        """Append one document, a sequence of ids in [0, vocab_size); an empty one is refused."""
        row = np.asarray(ids, dtype=np.int64)
        vocab_size = self._described["vocab_size"]
        if row.size == 0 or row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(f"a document needs ids in [0, {vocab_size}), got {row.size} ids {row[:8].tolist()}")
        content = row.astype(self.dtype).tobytes()
        try:
            self._bin.write(content)
        except OSError as error:
            raise self._explain(error) from error
        self._digest.update(content)
        self._lengths.append(row.size)
        self.tokens += row.size

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as failure:
            raise self._explain(failure) from failure
        finally:
            with contextlib.suppress(OSError):  # a full disk's last flush again; it was or is being reported
                self._bin.close()
            for suffix in (".bin", ".idx", ".json"):
                self._incomplete(suffix).unlink(missing_ok=True)

    def _publish(self) -> None:
        if not self._lengths:
            raise DataError(
                f"no document for {self.prefix}: the input holds no text", hint="check --input and --suffix"
            )
        lengths = np.frombuffer(self._lengths, dtype=np.intc).astype(np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        count = len(lengths)
        _flush(self._bin)
        with self._incomplete(".idx").open("wb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], count, count + 1))
            index.write(lengths.tobytes())
            index.write((offsets * self.dtype.itemsize).tobytes())
            index.write(np.arange(count + 1, dtype=np.int64).tobytes())
            _flush(index)
        info = TokenFileInfo(**self._described, documents=count, tokens=self.tokens, content=self._digest.hexdigest())
        with self._incomplete(".json").open("w", encoding="utf-8") as side_file:
            json.dump(asdict(info), side_file, indent=1)
            _flush(side_file)
        part(self.prefix, ".json").unlink(missing_ok=True)  # from here until the last rename there is no whole file
        for suffix in (".bin", ".idx", ".json"):
            self._incomplete(suffix).replace(part(self.prefix, suffix))

    def _incomplete(self, suffix: str) -> Path:
        return part(self.prefix, f"{suffix}.incomplete")

    def _explain(self, error: OSError) -> DataError:
        written = self.tokens * self.dtype.itemsize
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(self.prefix.parent).free
            return DataError(
                f"the disk of {self.prefix.parent} is full: {written:,} bytes of {self.prefix}.bin written, "
                f"{free:,} free; what was written is removed again",
                hint="free space, or write elsewhere with --output",
            )
        return DataError(f"cannot write {self.prefix}: {error.strerror} ({error.filename or self.prefix})")


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


class TokenFile:
    """A token file opened for reading through memory maps.

    Args:
        prefix: PREFIX of PREFIX.bin, PREFIX.idx and PREFIX.json.
        tokenizer_fingerprint: refuse tokens of another tokenizer; None accepts any.

    Attributes:
        info: PREFIX.json.
        lengths: int32[documents], tokens of each document.
        starts: int64[documents], index of each document's first token in `tokens`.
        tokens: the whole of PREFIX.bin, memory-mapped.

    Raises:
        DataError: a part is missing, damaged, or does not fit the others, or the tokenizer is another one.
    """

    def __init__(self, prefix: str | Path, tokenizer_fingerprint: str | None = None):
        self.prefix = Path(prefix)
        self.info = load_info(prefix)
        self.lengths, self.starts, self.tokens = _load_index(self.prefix)
        found = (len(self.lengths), int(self.lengths.sum(dtype=np.int64)))
        if found != (self.info.documents, self.info.tokens):
            raise DataError(
                f"{prefix}.json describes {self.info.documents:,} documents and {self.info.tokens:,} tokens, "
                f"{prefix}.idx holds {found[0]:,} and {found[1]:,}",
                hint="the files of one prefix come from different runs of `megakd prepare text`: prepare it again",
            )
        if tokenizer_fingerprint not in (None, self.info.tokenizer_fingerprint):
            raise DataError(
                f"{prefix} was written with tokenizer {self.info.tokenizer_fingerprint[:12]}..., "
                f"this run uses {tokenizer_fingerprint[:12]}...",
                hint="prepare the data with the run's tokenizer (`megakd prepare text --tokenizer`), "
                "or point data.tokenizer at the one it was written with",
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, a view of the file."""
        start = int(self.starts[number])
        return self.tokens[start : start + int(self.lengths[number])]


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
            hint="data.train and data.validation take the --output of `megakd prepare text`, without .bin",
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="prepare the data again") from error


def _load_index(prefix: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, starts, tokens) of a prefix, after checking every size in the header against the files."""
    index_path, bin_path = part(prefix, ".idx"), part(prefix, ".bin")
    damaged = "the file is damaged or was copied incompletely: copy it again, or prepare the data again"
    try:
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        bin_bytes = bin_path.stat().st_size
        if index.size < _HEADER.size:
            raise DataError(f"{index_path} has {index.size} bytes, its header alone needs {_HEADER.size}", hint=damaged)
        magic, version, code, count, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise DataError(f"{index_path} is no Megatron index of version 1 with integer tokens", hint=damaged)
        expected = _HEADER.size + 12 * count + 8 * boundaries
        if index.size < expected:
            raise DataError(
                f"{index_path} has {index.size:,} bytes, {count:,} documents need {expected:,}", hint=damaged
            )
        lengths = np.frombuffer(index, np.int32, count, _HEADER.size)
        offsets = np.frombuffer(index, np.int64, count, _HEADER.size + 4 * count)
        dtype = np.dtype(_DTYPES[code])
        needed = int((offsets + lengths.astype(np.int64) * dtype.itemsize).max()) if count else 0
        if bin_bytes < needed or bin_bytes == 0 or (count and (lengths.min() < 0 or offsets.min() < 0)):
            raise DataError(
                f"{bin_path} has {bin_bytes:,} bytes, {index_path} places tokens up to byte {needed:,}", hint=damaged
            )
        tokens = np.memmap(bin_path, mode="r", dtype=dtype, shape=(bin_bytes // dtype.itemsize,))
    except (OSError, ValueError) as error:  # ValueError: numpy will not map an empty file
        raise DataError(f"{prefix} cannot be read: {error}", hint=damaged) from error
    return lengths, offsets // dtype.itemsize, tokens
