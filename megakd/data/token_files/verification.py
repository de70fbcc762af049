"""The parts of a token file, compared with the digests that were made when they were written."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megakd.data.token_files.reader import TokenFile
from megakd.digests import CHUNK_BYTES, READERS, SAMPLED, FileDigests, Verify, digest_of
from megakd.file import File

Chunk = tuple[File, FileDigests, int]


def chunks_to_compare(files: Iterable[TokenFile], verify: Verify, share: int = 0, shares: int = 1) -> list[Chunk]:
    """One share of the chunks of some token files whose descriptions have digests.

    Args:
        verify: `sampled` is one chunk of SAMPLED, and the first and the last of each part.
        share, shares: which of how many that together are all of them.
    Returns:
        An open part, what it held, and the number of a chunk of it, for each.
    """
    parts = [(file.files[suffix], known) for file in files for suffix, known in (file.info.parts or {}).items()]
    every = [(file, known, number) for file, known in parts for number in _numbers(known, verify)]
    return every[share::shares]


def _numbers(known: FileDigests, verify: Verify) -> Sequence[int]:
    if verify == "never":
        return ()
    if verify == "always":
        return range(known.count)
    return sorted({*range(0, known.count, SAMPLED), known.count - 1})


def compare(chunks: Sequence[Chunk], advance: Callable[[int], object] = lambda size_bytes: None) -> None:
    """Read chunks, several at a time, and compare them.

    Args:
        advance: called with the bytes of each that was found whole.
    Raises:
        DataError: one cannot be read, or is not what was written; names the file and where.
    """
    with ThreadPoolExecutor(READERS, "megakd-verify") as threads:
        for size_bytes in threads.map(_compare_one, chunks):
            advance(size_bytes)


def size_of(chunk: Chunk) -> int:
    """Bytes of a chunk."""
    _, known, number = chunk
    return min(CHUNK_BYTES, known.size_bytes - number * CHUNK_BYTES)


def _compare_one(chunk: Chunk) -> int:
    file, known, number = chunk
    start, size_bytes = number * CHUNK_BYTES, size_of(chunk)
    if digest_of(file.read(start, size_bytes)) != known.of(number).hex():
        raise file.damaged(file.path, f"its bytes {start:,} to {start + size_bytes:,} are not those that were written")
    return size_bytes
