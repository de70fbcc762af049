"""Token files that Megatron or NeMo wrote, described so that megakd reads them."""

import hashlib
from pathlib import Path

import numpy as np

from megakd.data.token_files.layout import TokenFileInfo, part, write_info
from megakd.data.token_files.reader import load_index
from megakd.errors import DataError

_CHUNK_TOKENS = 1 << 24


def describe(prefix: str | Path, tokenizer) -> TokenFileInfo:
    """Write PREFIX.json for .bin and .idx files that were made elsewhere, after checking every token.

    Args:
        prefix: of the files.
        tokenizer: the one they were written with, as the caller claims.

    Raises:
        DataError: the files are damaged, or hold an id that the tokenizer does not have.
    """
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
    write_info(part(prefix, ".json.incomplete"), info)
    part(prefix, ".json.incomplete").replace(part(prefix, ".json"))
    return info
