"""Token files that Megatron or NeMo wrote, described so that megakd reads them."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from megakd.data.token_files.layout import TokenFileInfo, load_info, part, write_info
from megakd.data.token_files.reader import load_index
from megakd.errors import DataError
from megakd.ownership import Taken, owning
from megakd.publish import publishing

_CHUNK_TOKENS = 1 << 24


def describe(prefix: str | Path, tokenizer) -> TokenFileInfo:
    """Write PREFIX.json for .bin and .idx files that were made elsewhere, after checking every token.

    Args:
        prefix: of the files.
        tokenizer: the one they were written with, as the caller claims.

    Raises:
        DataError: megakd wrote them with a mask; the files are damaged, or hold an id that the tokenizer does not have.
    """
    masked = part(prefix, ".mask").exists()
    with contextlib.suppress(DataError):  # no description, or none that can be read
        masked = masked or load_info(prefix).masked
    if masked:
        raise DataError(
            f"{prefix} is a file of samples that megakd wrote; adopted, every token of it would be learnt",
            hint="it is read as it is; if .bin and .idx are others' and only .mask is left over, remove that",
        )
    lengths, starts, tokens = load_index(Path(prefix))
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
    try:
        with owning(part(prefix, ".lock"), remove=True), publishing(part(prefix, ".json")) as incomplete:
            write_info(incomplete, info)
    except Taken as owner:
        raise DataError(f"{prefix} is being written by {owner}", hint="wait for it") from owner
    except OSError as error:
        raise DataError(
            f"cannot write {prefix}.json: {error.strerror or error}", hint="the folder must be writable"
        ) from error
    return info
