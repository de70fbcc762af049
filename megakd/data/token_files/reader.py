"""A token file opened for reading, after every size in it has been checked."""

from pathlib import Path

import numpy as np

from megakd.data.token_files.layout import DAMAGED, DTYPES, HEADER, MAGIC, TokenFileInfo, load_info, part
from megakd.errors import DataError


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
        self.lengths, self.starts, self.tokens = load_index(self.prefix)
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
                f"{self.prefix}.bin holds token {wrong}, its vocabulary has {self.info.vocab_size} ids", hint=DAMAGED
            )


def _load_mask(prefix: Path, info: TokenFileInfo) -> tuple[np.ndarray, np.ndarray]:
    path = part(prefix, ".mask")
    expected = info.tokens + 4 * info.documents
    try:
        found = path.stat().st_size
        if found != expected:
            raise DataError(f"{path} has {found:,} bytes, its tokens and documents need {expected:,}", hint=DAMAGED)
        content = np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", hint=DAMAGED) from error
    return content[: info.tokens].view(bool), np.frombuffer(content, np.int32, info.documents, info.tokens)


def load_index(prefix: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, starts, tokens) of a prefix, after checking every size in the header against the files."""
    index_path, bin_path = part(prefix, ".idx"), part(prefix, ".bin")
    try:
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        bin_bytes = bin_path.stat().st_size
        if index.size < HEADER.size:
            raise DataError(f"{index_path} has {index.size} bytes, its header alone needs {HEADER.size}", hint=DAMAGED)
        magic, version, code, count, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise DataError(f"{index_path} is no Megatron index of version 1 with integer tokens", hint=DAMAGED)
        expected = HEADER.size + 12 * count + 8 * boundaries
        if index.size < expected:
            raise DataError(
                f"{index_path} has {index.size:,} bytes, {count:,} documents need {expected:,}", hint=DAMAGED
            )
        lengths = np.frombuffer(index, np.int32, count, HEADER.size)
        offsets = np.frombuffer(index, np.int64, count, HEADER.size + 4 * count)
        dtype = np.dtype(DTYPES[code])
        needed = int((offsets + lengths.astype(np.int64) * dtype.itemsize).max()) if count else 0
        if bin_bytes < needed or bin_bytes == 0 or (count and (lengths.min() < 0 or offsets.min() < 0)):
            raise DataError(
                f"{bin_path} has {bin_bytes:,} bytes, {index_path} places tokens up to byte {needed:,}", hint=DAMAGED
            )
        tokens = np.memmap(bin_path, mode="r", dtype=dtype, shape=(bin_bytes // dtype.itemsize,))
    except (OSError, ValueError) as error:  # ValueError: numpy will not map an empty file
        raise DataError(f"{prefix} cannot be read: {error}", hint=DAMAGED) from error
    return lengths, offsets // dtype.itemsize, tokens
