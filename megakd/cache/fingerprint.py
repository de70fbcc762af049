"""The identity of a teacher: a hash of its weight files, fast enough for any size."""

import hashlib
import pathlib

from megakd.errors import CacheError

BLOCK_BYTES = 1 << 16
BLOCKS = 16
RECORD = "megakd.json"  # says when and by what the checkpoint was saved, which is no part of the weights


def folder_fingerprint(folder) -> str:
    """Hash a checkpoint folder's files: names, sizes, and 16 evenly spaced blocks of 64 KiB of each.

    Any step of training changes practically all weights, so the blocks tell two checkpoints apart without reading
    hundreds of gigabytes. A copy has the same fingerprint; the same weights saved again, with other layouts or
    optimizer state, have another.

    Returns:
        BLAKE2b of 128 bits in hexadecimal.
    """
    folder = pathlib.Path(folder)
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
            with open(path, "rb") as file:
                last = max(size - BLOCK_BYTES, 0)
                for start in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
                    file.seek(start)
                    digest.update(file.read(BLOCK_BYTES))
    except OSError as error:
        raise CacheError(
            f"the teacher's files in {folder} cannot be read: {error}", hint="copy the checkpoint again"
        ) from error
    return digest.hexdigest()
