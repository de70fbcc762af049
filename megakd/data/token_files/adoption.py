"""Token files that Megatron or NeMo wrote, described so that megakd reads them."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from megakd.data.token_files.layout import TokenFileInfo, load_info, part, write_info
from megakd.data.token_files.publication import settle
from megakd.data.token_files.reader import Index, open_parts
from megakd.digests import Digester, digest_file
from megakd.errors import DataError
from megakd.ownership import Taken, owning
from megakd.publish import publishing


def describe(prefix: str | Path, tokenizer) -> TokenFileInfo:
    """Write PREFIX.json for .bin and .idx files that were made elsewhere, after checking every token.

    Args:
        prefix: of the files.
        tokenizer: the one they were written with, as the caller claims.

    Raises:
        DataError: megakd wrote them with a mask; the files are damaged, or hold an id that the tokenizer does not have.
    """
    prefix = Path(prefix)
    try:
        with owning(part(prefix, ".lock"), remove=True):
            settle(prefix)
            info = _described(prefix, tokenizer)
            with publishing(part(prefix, ".json")) as incomplete:
                write_info(incomplete, info)
    except Taken as owner:
        raise DataError(f"{prefix} is being written by {owner}", hint="wait for it") from owner
    except OSError as error:
        raise DataError(
            f"cannot write {prefix}.json: {error.strerror or error}", hint="the folder must be writable"
        ) from error
    return info


def _described(prefix: Path, tokenizer) -> TokenFileInfo:
    masked = part(prefix, ".mask").exists()
    with contextlib.suppress(DataError):  # no description, or none that can be read
        masked = masked or load_info(prefix).masked
    if masked:
        raise DataError(
            f"{prefix} is a file of samples that megakd wrote; adopted, every token of it would be learnt",
            hint="it is read as it is; if .bin and .idx are others' and only .mask is left over, remove that",
        )
    files = open_parts(prefix, None)
    index, ends_with_eos = Index(files, prefix), tokenizer.eos_id is not None
    lasts = np.sort((index.starts + index.lengths - 1)[index.lengths > 0])  # where documents have their last token
    content, digester, first = hashlib.blake2b(digest_size=16), Digester(), 0
    for block in files[".bin"].blocks():
        content.update(block)
        digester.update(block)
        chunk = np.frombuffer(block, index.dtype, len(block) // index.dtype.itemsize)
        outside = np.flatnonzero((chunk < 0) | (chunk >= tokenizer.vocab_size))
        if outside.size:
            raise DataError(
                f"{prefix}.bin holds token {chunk[outside[0]]} (token number {first + outside[0]:,}), tokenizer "
                f"{tokenizer.files[0]} has {tokenizer.vocab_size} ids",
                hint="name the tokenizer that the files were written with",
            )
        ours = slice(*np.searchsorted(lasts, [first, first + len(chunk)]))
        ends_with_eos = ends_with_eos and bool((chunk[lasts[ours] - first] == tokenizer.eos_id).all())
        first += len(chunk)
    total = int(index.lengths.sum(dtype=np.int64))
    return TokenFileInfo(
        tokenizer.fingerprint, tokenizer.vocab_size, len(index.lengths), total, ends_with_eos, content.hexdigest(),
        supervised=total, parts={".bin": digester.digests(), ".idx": digest_file(files[".idx"].path)},
    )  # fmt: skip
