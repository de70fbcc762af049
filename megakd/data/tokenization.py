"""Records to token files: blocks of the input are tokenized by worker processes and written in their order.

The result does not depend on the number of workers. Memory is bounded: at most two blocks a worker are under way.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megakd.data.formats import (
    BadRecord,
    SampleFormat,
    build_formatter,
    check_format,
    detect_format,
    encode_segments,
)
from megakd.data.records import Block, Problems, read_blocks, records_of
from megakd.data.token_files.writer import TokenFileWriter
from megakd.data.tokenizers.load import load_tokenizer
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError
from megakd.processes import follow_parent
from megakd.progress import progress_bar

_POOL_BYTES = 1 << 23  # smaller inputs are done before the workers have started
_ENCODER: "Encoder"  # a worker process's own, made once when it starts


@dataclass
class Encoded:
    """The samples of one block: ids and mask of all in a row, the length of each; how many records were empty."""

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    problems: Problems
    empty: int


@dataclass(frozen=True)
class Summary:
    """What a tokenization did.

    Attributes:
        documents, tokens, supervised: written.
        empty: records without any token, left out.
        problems: records that could not be used (only with on_error "skip"; else they have been raised).
        input_bytes, seconds: what was read, and how long all of it took.
    """

    documents: int
    tokens: int
    supervised: int
    empty: int
    problems: Problems
    input_bytes: int
    seconds: float

    def __str__(self) -> str:
        share = "" if self.supervised == self.tokens else f" ({self.supervised:,} supervised)"
        speed = f"{self.input_bytes / 1e6 / self.seconds:.2f} MB/s, {self.tokens / self.seconds:,.0f} tokens/s"
        text = (
            f"{self.documents:,} documents, {self.tokens:,} tokens{share} from {self.input_bytes:,} bytes, "
            f"{self.seconds:.1f} s, {speed}"
        )
        if self.empty:
            text += f"\nleft out {self.empty} empty documents"
        if self.problems.count:
            text += f"\nleft out {self.problems.count} records that cannot be used:\n{self.problems}"
        return text


class Encoder:
    """Turns blocks into samples; one in every process."""

    def __init__(self, tokenizer_path: Path, sample_format: SampleFormat):
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._format = sample_format
        self._segments = build_formatter(sample_format, self._tokenizer)

    def __call__(self, block: Block, only_check: bool) -> Encoded:
        """Encode one block; with `only_check` records are only read and formatted, to find what is wrong."""
        problems, empty = Problems(), 0
        rows: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        for where, record in records_of(block, problems):
            try:
                segments = self._segments(record)
                if only_check:
                    continue
                ids, mask = encode_segments(segments, self._tokenizer, self._format)
            except BadRecord as error:
                problems.add(where, str(error))
                continue
            if any(segment.text for segment in segments):
                rows.append(np.asarray(ids, np.int32))
                masks.append(np.asarray(mask, bool))
            else:
                empty += 1
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        return Encoded(
            np.concatenate(rows) if rows else np.zeros(0, np.int32),
            np.concatenate(masks) if masks else np.zeros(0, bool),
            lengths, problems, empty,
        )  # fmt: skip


def write_token_file(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    sample_format: SampleFormat,
    *,
    on_error: str = "raise",
    workers: int | None = None,
    progress: bool = True,
) -> Summary:
    """Tokenize files into PREFIX.bin, .idx, .json, and .mask unless the format is running text.

    Args:
        files: in the order their documents will have; see `records` for the kinds.
        prefix: where to write.
        tokenizer: loaded from its files; workers load it again.
        sample_format: what the records mean; `detect` finds it out.
        on_error: "raise" reads to the end and then names all records that cannot be used; "skip" leaves them out.
        workers: processes; None: one for each processor that this process may use.
        progress: show a bar over the input's bytes on stderr.

    Raises:
        DataError: nothing is left under PREFIX then.
    """
    check_format(sample_format, tokenizer)
    started, problems, empty = time.monotonic(), Problems(on_error), 0
    total = sum(path.stat().st_size for path in files)
    count = workers or len(os.sched_getaffinity(0))
    writer = TokenFileWriter(
        prefix,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_appended=sample_format.add_eos and sample_format.name in ("text", "prompt_response"),
        masked=sample_format.name != "text",
        made_from=sample_format.relevant(tokenizer),
    )
    with writer, _encoding(tokenizer.files[0], sample_format, count if total > _POOL_BYTES else 1) as encode:
        blocks = _with_progress(read_blocks(files), total, progress)
        for encoded in encode(blocks, lambda: bool(problems.count) and on_error == "raise"):
            problems.extend(encoded.problems)
            empty += encoded.empty
            if encoded.lengths.size:
                writer.add_many(encoded.ids, encoded.lengths, encoded.mask if sample_format.name != "text" else None)
        problems.check()
        writer.skipped = problems.count
    seconds = time.monotonic() - started
    return Summary(writer.documents, writer.tokens, writer.supervised, empty, problems, total, seconds)


def detect(files: Sequence[Path], columns: dict[str, str]) -> str:
    """The format shown by the first record of `files` that can be read.

    Raises:
        DataError: no record can be read, or it shows no format.
    """
    problems = Problems()
    for block in read_blocks(files, block_bytes=1 << 16):
        for where, record in records_of(block, problems):
            return detect_format(record, columns, where)
        problems.check()
    raise DataError(f"{files[0]} holds no record", hint="the input is empty")


@contextlib.contextmanager
def _encoding(tokenizer_path: Path, sample_format: SampleFormat, workers: int):
    """A function from blocks to their results in order, here or in worker processes that end with the context."""
    if workers == 1:
        encoder = Encoder(tokenizer_path, sample_format)
        yield lambda blocks, only_check: (encoder(block, only_check()) for block in blocks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer_path, sample_format))
    try:
        yield lambda blocks, only_check: _in_order(pool, blocks, only_check, 2 * workers)
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process died without a word, as when memory runs out",
            hint="fewer processes: --workers (data.workers in a run)",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool, blocks: Iterable[Block], only_check, most: int) -> Iterator[Encoded]:
    under_way: deque = deque()
    for block in blocks:
        if len(under_way) == most:
            yield under_way.popleft().result()
        under_way.append(pool.submit(_encode, block, only_check()))
    while under_way:
        yield under_way.popleft().result()


def _start_worker(tokenizer_path: Path, sample_format: SampleFormat) -> None:
    global _ENCODER
    follow_parent()
    _ENCODER = Encoder(tokenizer_path, sample_format)


def _encode(block: Block, only_check: bool) -> Encoded:
    return _ENCODER(block, only_check)


def _with_progress(blocks: Iterator[Block], total: int, shown: bool) -> Iterator[Block]:
    with progress_bar(total, "tokenizing", unit="B", shown=shown) as bar:
        for block in blocks:
            yield block
            bar.update(block.input_bytes)
