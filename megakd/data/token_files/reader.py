"""A token file opened for reading, after every size in it has been checked."""

from pathlib import Path

import numpy as np

from megakd.data.token_files.layout import DAMAGED, DTYPES, HEADER, MAGIC, TokenFileInfo, load_info, part
from megakd.data.token_files.publication import waiting
from megakd.errors import DataError
from megakd.file import File


class TokenFile:
    """A token file opened for reading, by position: a file that shrinks or a disk that fails later is a DataError.

    Args:
        prefix: PREFIX of PREFIX.bin, PREFIX.idx and PREFIX.json.
        tokenizer_fingerprint: refuse tokens of another tokenizer; None accepts any.

    Attributes:
        info: PREFIX.json.
        index: lengths and starts of the documents.
        files: the open parts, by suffix.

    Raises:
        DataError: a part is missing, damaged, or does not fit the others, or the tokenizer is another one.
    """

    def __init__(self, prefix: str | Path, tokenizer_fingerprint: str | None = None):
        self.prefix = Path(prefix)
        self.info, self.files, self.index = self._open()
        if tokenizer_fingerprint not in (None, self.info.tokenizer_fingerprint):
            raise DataError(
                f"{prefix} was written with tokenizer {self.info.tokenizer_fingerprint[:12]}..., "
                f"this run uses {tokenizer_fingerprint[:12]}...",
                hint="prepare the data with the run's tokenizer (`megakd prepare text --tokenizer`), "
                "or point data.tokenizer at the one it was written with",
            )

    def _open(self) -> tuple[TokenFileInfo, dict[str, File], "Index"]:
        """All parts of one set: if another one is published meanwhile, that one."""
        while True:
            info = load_info(self.prefix)
            try:
                files = open_parts(self.prefix, info)
                index = Index(files, self.prefix)
                _check_counts(self.prefix, info, files, index)
            except DataError:
                if load_info(self.prefix) == info:
                    raise
            else:
                if load_info(self.prefix) == info:
                    return info, files, index

    def __len__(self) -> int:
        return len(self.index.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """int32[documents], tokens of each document."""
        return self.index.lengths

    @property
    def starts(self) -> np.ndarray:
        """int64[documents], index of each document's first token."""
        return self.index.starts

    @property
    def firsts(self) -> np.ndarray:
        """int32[documents] of PREFIX.mask, read now."""
        return np.frombuffer(self.files[".mask"].read(self.info.tokens, 4 * self.info.documents), np.int32)

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), in the file's type.

        Raises:
            DataError: they cannot be read, or are no longer there.
        """
        dtype = self.index.dtype
        return np.frombuffer(self.files[".bin"].read(start * dtype.itemsize, count * dtype.itemsize), dtype)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """bool[count], which of tokens [start, start + count) of a masked file are supervised; raises as above."""
        return np.frombuffer(self.files[".mask"].read(start, count), bool)

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document."""
        return self.read_tokens(int(self.starts[number]), int(self.lengths[number]))

    def check_ids(self, ids: np.ndarray) -> None:
        """Raise a DataError unless all ids read from this file belong to the vocabulary."""
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            wrong = ids.max() if ids.min() >= 0 else ids.min()
            raise DataError(
                f"{self.prefix}.bin holds token {wrong}, its vocabulary has {self.info.vocab_size} ids", hint=DAMAGED
            )


class Index:
    """PREFIX.idx, after checking every size in its header against the files.

    Args:
        files: the open ".bin" and ".idx".

    Attributes:
        dtype: of the tokens.
        lengths: int32[documents], tokens of each document.
        starts: int64[documents], index of each document's first token.

    Raises:
        DataError: they do not fit each other.
    """

    def __init__(self, files: dict[str, File], prefix: Path):
        index, content = files[".idx"], files[".bin"]
        if index.size_bytes < HEADER.size:
            raise damaged(index.path, f"it has {index.size_bytes} bytes, its header alone needs {HEADER.size}")
        magic, version, code, count, boundaries = HEADER.unpack(index.read(0, HEADER.size))
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise damaged(index.path, "it is no Megatron index of version 1 with integer tokens")
        expected = HEADER.size + 12 * count + 8 * boundaries
        if index.size_bytes < expected:
            raise damaged(index.path, f"it has {index.size_bytes:,} bytes, {count:,} documents need {expected:,}")
        self.dtype = np.dtype(DTYPES[code])
        self.lengths = np.frombuffer(index.read(HEADER.size, 4 * count), np.int32)
        offsets = np.frombuffer(index.read(HEADER.size + 4 * count, 8 * count), np.int64)
        needed = int((offsets + self.lengths.astype(np.int64) * self.dtype.itemsize).max()) if count else 0
        negative = count and (self.lengths.min() < 0 or offsets.min() < 0)
        if content.size_bytes < needed or content.size_bytes == 0 or negative:
            raise damaged(
                content.path, f"it has {content.size_bytes:,} bytes, {index.path} places tokens up to byte {needed:,}"
            )
        self.starts = offsets // self.dtype.itemsize


def damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}", hint=DAMAGED)


def open_parts(prefix: Path, info: TokenFileInfo | None) -> dict[str, File]:
    """The files of a prefix by suffix.

    Args:
        info: None for files that have no description yet.
    Raises:
        DataError: one is missing, cannot be read, or has another size than was written.
    """
    suffixes = (".bin", ".idx", ".mask") if info is not None and info.masked else (".bin", ".idx")
    return {suffix: _open_part(prefix, suffix, info) for suffix in suffixes}


def _open_part(prefix: Path, suffix: str, info: TokenFileInfo | None) -> File:
    path = part(prefix, suffix)
    if info is None or info.parts is None:
        return File(path, _size_bytes(path), damaged)
    size_bytes, early = info.parts[suffix].size_bytes, waiting(prefix, suffix, info)
    try:
        return File(early, size_bytes, damaged)
    except DataError:
        if early.exists():
            raise
    return File(path, size_bytes, damaged)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=DAMAGED) from error


def _check_counts(prefix: Path, info: TokenFileInfo, files: dict[str, File], index: Index) -> None:
    found = (len(index.lengths), int(index.lengths.sum(dtype=np.int64)))
    if found != (info.documents, info.tokens):
        raise DataError(
            f"{prefix}.json describes {info.documents:,} documents and {info.tokens:,} tokens, "
            f"{prefix}.idx holds {found[0]:,} and {found[1]:,}",
            hint=DAMAGED,
        )
    expected = info.tokens + 4 * info.documents
    if info.masked and files[".mask"].size_bytes != expected:
        mask = files[".mask"]
        raise damaged(mask.path, f"it has {mask.size_bytes:,} bytes, its tokens and documents need {expected:,}")
