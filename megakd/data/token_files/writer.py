"""Writing one token file, document by document: whole under its name, or not there."""

import contextlib
import errno
import hashlib
import secrets
import shutil
from pathlib import Path

import numpy as np

from megakd.data.token_files.layout import CODES, HEADER, MAGIC, NEVER, TokenFileInfo, part, write_info
from megakd.data.token_files.publication import publish_parts, settle
from megakd.digests import DigestingFile
from megakd.errors import DataError
from megakd.ownership import Taken, check_owner, owning
from megakd.publish import INCOMPLETE, make_folder


class TokenFileWriter:
    """Writes one token file, document by document; nothing appears under PREFIX unless the `with` block ends well.

    At every moment, and after a kill or a power cut, a `TokenFile` finds the old file or the new one whole
    (`megakd.data.token_files.publication`).

    Args:
        prefix: where to write; an older file of that name is replaced.
        tokenizer_fingerprint, vocab_size, eos_appended, masked, made_from: as in `TokenFileInfo`.

    Attributes:
        documents, tokens, supervised: added so far.
        skipped: to be set before the block ends, as in `TokenFileInfo`.

    Raises:
        DataError: the disk is full or cannot be written, no document was added, or another process is writing PREFIX.
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
        self._private = f".{secrets.token_hex(4)}{INCOMPLETE}"  # no other writer's
        self._ownership = contextlib.ExitStack()
        self._digest = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> "TokenFileWriter":
        try:
            make_folder(self.prefix.parent)
            self._ownership.enter_context(owning(part(self.prefix, ".lock"), remove=True))
            settle(self.prefix)
            self._bin = DigestingFile(self._incomplete(".bin"))
            self._mask = DigestingFile(self._incomplete(".mask")) if self._described["masked"] else None
        except Taken as owner:
            raise DataError(
                f"{self.prefix} is being written by {owner}", hint="wait for it, or write elsewhere"
            ) from owner
        except OSError as error:
            self._ownership.close()
            raise self._explain(error) from error
        return self

    def add(self, ids, mask=None) -> None:
        """Append one document: its ids, and for a masked file whether each is supervised."""
        self.add_many(ids, [len(ids)], mask)

    def add_many(self, ids, lengths, mask=None, *, continues: bool = False) -> None:
        """Append documents.

        Args:
            ids: their ids in a row, each in [0, vocab_size).
            lengths: tokens of each, at least 1.
            mask: for a masked file, whether each id is supervised.
            continues: the first is the rest of the document added last (not in a masked file).
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
        if continues:
            self._continue(int(lengths[0]))
            lengths = lengths[1:]
        self._lengths.append(lengths)
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.supervised += len(ids) if mask is None else int(mask.sum())

    def _continue(self, more: int) -> None:
        last = next(lengths for lengths in reversed(self._lengths) if lengths.size)
        if int(last[-1]) + more > np.iinfo(np.int32).max:
            raise DataError(
                f"document {self.documents} of {self.prefix} has more than {np.iinfo(np.int32).max:,} tokens, which "
                "Megatron's index cannot count",
                hint="split the file",
            )
        last[-1] += more

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
            self._ownership.close()

    def _publish(self) -> None:
        if not self._lengths:
            raise DataError(
                f"no document for {self.prefix}: the input holds no text", hint="check --input and --suffix"
            )
        lengths = np.concatenate(self._lengths)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        files = {".bin": self._bin}
        if self._mask is not None:
            self._mask.write(np.concatenate(self._firsts).tobytes())
            files[".mask"] = self._mask
        with DigestingFile(self._incomplete(".idx")) as index:
            index.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            index.write(lengths.tobytes())
            index.write((offsets * self.dtype.itemsize).tobytes())
            index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
            files[".idx"] = index
            for file in files.values():
                file.sync()
        info = TokenFileInfo(
            **self._described,
            documents=self.documents,
            tokens=self.tokens,
            content=self._digest.hexdigest(),
            supervised=self.supervised,
            skipped=self.skipped,
            parts={suffix: file.digester.digests() for suffix, file in files.items()},
        )
        write_info(self._incomplete(".json"), info)
        check_owner(part(self.prefix, ".lock"))
        publish_parts(self.prefix, {suffix: self._incomplete(suffix) for suffix in [*files, ".json"]}, info)

    def _incomplete(self, suffix: str) -> Path:
        return part(self.prefix, f"{suffix}{self._private}")

    def _explain(self, error: OSError) -> DataError:
        written = self.tokens * self.dtype.itemsize
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(self.prefix.parent).free
            return DataError(
                f"the disk of {self.prefix.parent} is full: {written:,} bytes of {self.prefix}.bin written, "
                f"{free:,} free; what was written is removed again",
                hint="free space, or write elsewhere with --output",
            )
        return DataError(f"cannot write {self.prefix}: {error.strerror or error} ({error.filename or self.prefix})")


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
