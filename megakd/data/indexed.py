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

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megakd.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_DAMAGED = "the file is damaged or was copied incompletely: copy it again, or prepare the data again"
_CHUNK_TOKENS = 1 << 24
NEVER = np.iinfo(np.int32).max
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


class TokenFileWriter:
    """Writes one token file, document by document; nothing appears under PREFIX unless the `with` block ends well.

    Args:
        prefix: where to write; an older file of that name is replaced.
        tokenizer_fingerprint, vocab_size, eos_appended, masked, made_from: as in `TokenFileInfo`.

    Attributes:
        documents, tokens, supervised: added so far.
        skipped: to be set before the block ends, as in `TokenFileInfo`.

    Raises:
        DataError: the disk is full or cannot be written, or no document was added.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        tokenizer_fingerprint: str,
        vocab_size: int,
        eos_appended: bool,
        masked: bool = False,
        made_from: dict | None = None,
    ):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
        self.documents = self.tokens = self.supervised = self.skipped = 0
        self._described = dict(
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            eos_appended=eos_appended,
            masked=masked,
            made_from=made_from,
        )
        self._lengths: list[np.ndarray] = []
        self._firsts: list[np.ndarray] = []
        self._digest = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> "TokenFileWriter":
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._incomplete(".bin").open("wb")
            self._mask = self._incomplete(".mask").open("wb") if self._described["masked"] else None
        except OSError as error:
            raise self._explain(error) from error
        return self

    def add(self, ids, mask=None) -> None:
        """Append one document: its ids, and for a masked file whether each is supervised."""
        self.add_many(ids, [len(ids)], mask)

    def add_many(self, ids, lengths, mask=None) -> None:
        """Append documents.

        Args:
            ids: their ids in a row, each in [0, vocab_size).
            lengths: tokens of each, at least 1.
            mask: for a masked file, whether each id is supervised.
        """
        ids, lengths = np.asarray(ids, np.int64), np.asarray(lengths, np.int32)
        vocab_size = self._described["vocab_size"]
        if lengths.size == 0 or lengths.min() < 1 or ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"documents need ids in [0, {vocab_size}), got lengths {lengths[:8]} and ids {ids[:8]}")
        content = ids.astype(self.dtype).tobytes()
        try:
            self._bin.write(content)
            if self._mask is not None:
                mask = np.asarray(mask, bool)
                self._mask.write(mask.tobytes())
                self._firsts.append(_first_supervised(mask, lengths))
        except OSError as error:
            raise self._explain(error) from error
        self._digest.update(content)
        self._lengths.append(lengths)
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.supervised += len(ids) if mask is None else int(mask.sum())

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as failure:
            raise self._explain(failure) from failure
        finally:
            for file in (self._bin, self._mask):
                with contextlib.suppress(OSError):  # a full disk's last flush again; it was or is being reported
                    _ = file and file.close()
            for suffix in (".bin", ".mask", ".idx", ".json"):
                self._incomplete(suffix).unlink(missing_ok=True)

    def _publish(self) -> None:
        if not self._lengths:
            raise DataError(
                f"no document for {self.prefix}: the input holds no text", hint="check --input and --suffix"
            )
        lengths = np.concatenate(self._lengths)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        _flush(self._bin)
        if self._mask is not None:
            self._mask.write(np.concatenate(self._firsts).tobytes())
            _flush(self._mask)
        with self._incomplete(".idx").open("wb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            index.write(lengths.tobytes())
            index.write((offsets * self.dtype.itemsize).tobytes())
            index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
            _flush(index)
        info = TokenFileInfo(
            **self._described,
            documents=self.documents,
            tokens=self.tokens,
            content=self._digest.hexdigest(),
            supervised=self.supervised,
            skipped=self.skipped,
        )
        write_info(self._incomplete(".json"), info)
        part(self.prefix, ".json").unlink(missing_ok=True)  # from here until the last rename there is no whole file
        part(self.prefix, ".mask").unlink(missing_ok=True)
        for suffix in (".bin", ".mask", ".idx", ".json") if self._mask is not None else (".bin", ".idx", ".json"):
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


def write_info(path: Path, info: TokenFileInfo) -> None:
    """Write a description, through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(asdict(info), file, indent=1)
        _flush(file)


def _first_supervised(mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32 place inside each document of the first token that is supervised and has one before it."""
    firsts = np.full(len(lengths), NEVER, np.int32)
    starts = np.cumsum(lengths) - lengths
    places = np.flatnonzero(mask)
    documents = np.searchsorted(starts, places, side="right") - 1
    inside = places - starts[documents]
    documents, inside = documents[inside > 0], inside[inside > 0]
    documents, earliest = np.unique(documents, return_index=True)
    firsts[documents] = inside[earliest]
    return firsts


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
        mask: bool[tokens], memory-mapped; None if every token is supervised.
        firsts: int32[documents] of PREFIX.mask; None without one.

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

        self.mask = self.firsts = None
        if self.info.masked:
            self.mask, self.firsts = _load_mask(self.prefix, self.info)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, a view of the file."""
        start = int(self.starts[number])
        return self.tokens[start : start + int(self.lengths[number])]

    def check_ids(self, ids: np.ndarray) -> None:
        """Raise a DataError unless all ids read from this file belong to the vocabulary."""
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            wrong = ids.max() if ids.min() >= 0 else ids.min()
            raise DataError(
                f"{self.prefix}.bin holds token {wrong}, its vocabulary has {self.info.vocab_size} ids", hint=_DAMAGED
            )


def describe(prefix: str | Path, tokenizer) -> TokenFileInfo:
    """Write PREFIX.json for .bin and .idx files that were made elsewhere, after checking every token.

    Args:
        prefix: of the files.
        tokenizer: the one they were written with, as the caller claims.

    Raises:
        DataError: the files are damaged, or hold an id that the tokenizer does not have.
    """
    lengths, starts, tokens = _load_index(Path(prefix))
    digest, ends_with_eos = hashlib.blake2b(digest_size=16), tokenizer.eos_id is not None
    for first in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[first : first + _CHUNK_TOKENS]
        digest.update(chunk.tobytes())
        outside = np.flatnonzero((chunk < 0) | (chunk >= tokenizer.vocab_size))
        if outside.size:
            raise DataError(
                f"{prefix}.bin holds token {chunk[outside[0]]} (token number {first + outside[0]:,}), tokenizer "
                f"{tokenizer.files[0]} has {tokenizer.vocab_size} ids",
                hint="name the tokenizer that the files were written with",
            )
    filled = lengths > 0
    ends_with_eos = ends_with_eos and bool((tokens[(starts + lengths - 1)[filled]] == tokenizer.eos_id).all())
    total = int(lengths.sum(dtype=np.int64))
    info = TokenFileInfo(
        tokenizer.fingerprint, tokenizer.vocab_size, len(lengths), total, ends_with_eos, digest.hexdigest(),
        supervised=total,
    )  # fmt: skip
    write_info(part(prefix, ".json.incomplete"), info)
    part(prefix, ".json.incomplete").replace(part(prefix, ".json"))
    return info


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


def _load_mask(prefix: Path, info: TokenFileInfo) -> tuple[np.ndarray, np.ndarray]:
    path = part(prefix, ".mask")
    expected = info.tokens + 4 * info.documents
    try:
        found = path.stat().st_size
        if found != expected:
            raise DataError(f"{path} has {found:,} bytes, its tokens and documents need {expected:,}", hint=_DAMAGED)
        content = np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", hint=_DAMAGED) from error
    return content[: info.tokens].view(bool), np.frombuffer(content, np.int32, info.documents, info.tokens)


def _load_index(prefix: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, starts, tokens) of a prefix, after checking every size in the header against the files."""
    index_path, bin_path = part(prefix, ".idx"), part(prefix, ".bin")
    try:
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        bin_bytes = bin_path.stat().st_size
        if index.size < _HEADER.size:
            raise DataError(
                f"{index_path} has {index.size} bytes, its header alone needs {_HEADER.size}", hint=_DAMAGED
            )
        magic, version, code, count, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise DataError(f"{index_path} is no Megatron index of version 1 with integer tokens", hint=_DAMAGED)
        expected = _HEADER.size + 12 * count + 8 * boundaries
        if index.size < expected:
            raise DataError(
                f"{index_path} has {index.size:,} bytes, {count:,} documents need {expected:,}", hint=_DAMAGED
            )
        lengths = np.frombuffer(index, np.int32, count, _HEADER.size)
        offsets = np.frombuffer(index, np.int64, count, _HEADER.size + 4 * count)
        dtype = np.dtype(_DTYPES[code])
        needed = int((offsets + lengths.astype(np.int64) * dtype.itemsize).max()) if count else 0
        if bin_bytes < needed or bin_bytes == 0 or (count and (lengths.min() < 0 or offsets.min() < 0)):
            raise DataError(
                f"{bin_path} has {bin_bytes:,} bytes, {index_path} places tokens up to byte {needed:,}", hint=_DAMAGED
            )
        tokens = np.memmap(bin_path, mode="r", dtype=dtype, shape=(bin_bytes // dtype.itemsize,))
    except (OSError, ValueError) as error:  # ValueError: numpy will not map an empty file
        raise DataError(f"{prefix} cannot be read: {error}", hint=_DAMAGED) from error
    return lengths, offsets // dtype.itemsize, tokens
