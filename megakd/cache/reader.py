"""Reading a cache: what the teacher said about a sample, found by the sample's content, from any thread.

Sizes: S ids of a sample, T of them supervised in this run, K slots.
"""

import itertools
import pathlib
import threading
from collections import OrderedDict

import numpy as np

from megakd.cache.head import check_head_fits
from megakd.cache.header import Header, read_header
from megakd.cache.index import Index
from megakd.cache.row import NO_LABEL, EncodedRow, HiddenRow, Row, decode_mask, decode_row
from megakd.cache.shard import Shard, damaged
from megakd.cache.tables import HiddenTable, Table, build_table
from megakd.errors import CacheError

OPEN_SHARDS = 256  # at a time; each holds a file descriptor and its rows' keys and masks
CHECK_EVERY = 16  # rows between checksums when they are sampled


class CacheReader:
    """A finished cache, opened for one temperature and number of entries.

    Args:
        folder: of the cache.
        temperature: one of the recorded ones; of hidden states any.
        top_k: most entries to give per token; None gives all that are stored. Hidden states are given as they are.
        check_all: compare the checksum of every row; False: of one in 16.
    Raises:
        CacheError: it is missing, damaged, unfinished, or was not recorded for this.
    """

    def __init__(self, folder, *, temperature: float = 1.0, top_k: int | None = None, check_all: bool = True):
        self.folder, self.header = pathlib.Path(folder), read_header(folder)
        self.temperature = temperature
        self.top_k = None if self.header.contents.sampled else top_k  # draws are taken all or not at all
        check_finished(self.folder, self.header)
        if self.header.contents.hidden_size:
            check_head_fits(self.folder, self.header)
        else:
            check_fits(self.folder, self.header, temperature, top_k)
        self.index = Index(folder, self.header)
        self._check_every, self._count = 1 if check_all else CHECK_EVERY, itertools.count()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Samples."""
        return len(self.index)

    def row(self, shard: int, row: int) -> Row | HiddenRow:
        """A row by its place, decoded at the reader's temperature."""
        opened = self.shard(shard)
        return self._decode(opened, row, opened.row(row))

    def table(self, key: bytes, mask_S: np.ndarray, last_label: int) -> Table | HiddenTable | None:
        """What the teacher said at the supervised positions of a sample, in their order.

        Args:
            key: content key of its ids.
            mask_S: bool, the positions wanted; a subset of the recorded ones.
            last_label: label of the last position, -1 if it is not wanted.
        Returns:
            T rows; None if these ids were not recorded.
        Raises:
            CacheError: they were, but without some of these positions or with another last label; or it is damaged.
        """
        row = self.find(key, mask_S, last_label)
        if row is None:
            return None
        table = HiddenTable(row.hidden_TH) if isinstance(row, HiddenRow) else build_table(row, self.top_k)
        return table if row.tokens == int(mask_S.sum()) else table.rows(mask_S[row.mask_S])

    def find(self, key: bytes, mask_S: np.ndarray, last_label: int) -> Row | HiddenRow | None:
        """The row of a sample, with all its recorded positions; otherwise as `table`."""
        found = self.index.find(key)
        for shard, number in found:
            opened = self.shard(shard)
            encoded = opened.row(number)
            if encoded.key != key:
                raise damaged(opened.path, f"row {number} is of another sample than the key index says")
            recorded_S = decode_mask(encoded.mask, encoded.length)
            if last_label in (NO_LABEL, encoded.last_label) and not (mask_S & ~recorded_S).any():
                return self._decode(opened, number, encoded)
        if found:
            self._refuse(found, mask_S, last_label)
        return None

    def shard(self, number: int) -> Shard:
        """An open shard; the one used longest ago is closed for it when many are open."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        shard = Shard(self.folder, self.header.shards[number], check=number not in self._checked)
        with self._lock:
            self._open[number] = shard
            self._checked.add(number)
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _decode(self, opened: Shard, number: int, encoded: EncodedRow) -> Row | HiddenRow:
        check = next(self._count) % self._check_every == 0
        try:
            return decode_row(encoded, self.header.contents, self.temperature, check=check)
        except CacheError as error:
            raise CacheError(f"{opened.path}, row {number}: {error.args[0]}", hint=error.hint) from error

    def _refuse(self, found: list[tuple[int, int]], mask_S: np.ndarray, last_label: int) -> None:
        """Raises CacheError with what the recorded row that comes nearest lacks."""
        extras = []
        for shard, number in found:
            encoded = self.shard(shard).row(number)
            recorded_S = decode_mask(encoded.mask, encoded.length)
            extras.append((np.flatnonzero(mask_S & ~recorded_S), encoded.last_label))
        extra, recorded_label = min(extras, key=lambda found: len(found[0]))
        if len(extra):
            raise CacheError(
                f"{self.folder} holds this sample without {len(extra)} of its {int(mask_S.sum())} supervised "
                f"positions, first position {extra[0]}",
                hint="a run may supervise what was recorded or less; record again with this mask",
            )
        raise CacheError(
            f"{self.folder} holds this sample with {recorded_label} as its last label, this run has {last_label}",
            hint="the samples differ from the recorded ones after their last id; record the cache again",
        )


def check_finished(folder: pathlib.Path, header: Header) -> None:
    """Raises CacheError unless the cache is whole and nothing in the folder is unaccounted for."""
    if not header.finished:
        there = len(list(folder.glob("shard-*.json")))
        raise CacheError(
            f"{folder} is not finished: {there} of {header.parts} parts are there",
            hint="start the same `megakd cache` again: it records what is missing",
        )
    listed = {shard.file for shard in header.shards}
    present = {path.name for path in folder.glob("*.arrow")}
    for names, what in ((present - listed, "is not listed in"), (listed - present, "is missing, but listed in")):
        if names:
            raise CacheError(
                f"{folder}: shard {min(names)} {what} cache.json ({len(names)} such)",
                hint="copy the whole folder again; caches are joined with `megakd cache merge`, not by copying shards",
            )


def check_fits(folder, header: Header, temperature: float, top_k: int | None) -> None:
    """Raises CacheError for a temperature or a number of entries that was not recorded."""
    contents = header.contents
    if temperature not in contents.temperatures:
        recorded = ", ".join(f"{t:g}" for t in contents.temperatures)
        raise CacheError(
            f"{folder} was recorded at temperature {recorded}, this run wants {temperature:g}",
            hint="set loss.temperature to a recorded one, or record again with cache.temperatures",
        )
    if top_k is not None and not contents.sampled and top_k > contents.top_k:
        raise CacheError(
            f"{folder} holds {contents.top_k} entries a token, this run wants {top_k}",
            hint=f"set loss.top_k to at most {contents.top_k}, or record again with a larger cache.top_k",
        )


def check_identity(
    folder, header: Header, *, tokenizer_fingerprint: str, vocab_size: int, teacher_fingerprint: str | None = None
) -> None:
    """Raises CacheError unless the cache was recorded for this tokenizer, vocabulary and, where given, teacher.

    Args:
        vocab_size: real vocabulary of the student; the recorded one may be smaller.
    """
    if header.tokenizer_fingerprint != tokenizer_fingerprint:
        raise CacheError(
            f"{folder} was recorded for tokenizer {header.tokenizer_fingerprint[:12]}, "
            f"this run uses {tokenizer_fingerprint[:12]}",
            hint="record again with `megakd cache`, or point teacher.cache at a cache of this tokenizer",
        )
    if header.contents.vocab_size > vocab_size:
        raise CacheError(
            f"{folder} holds ids of a vocabulary of {header.contents.vocab_size}, the student has {vocab_size}",
            hint="record again with this student in the config",
        )
    if teacher_fingerprint is not None and header.teacher_fingerprint != teacher_fingerprint:
        recorded = header.teacher_fingerprint[:12] or "none: it was imported"
        raise CacheError(
            f"{folder} was recorded from teacher {recorded}, teacher.checkpoint is {teacher_fingerprint[:12]}",
            hint="leave teacher.checkpoint out to use the cache as it is, or record again",
        )
