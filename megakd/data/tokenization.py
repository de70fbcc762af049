"""Records to token files: blocks of the input are tokenized by worker processes and written in their order.

The result does not depend on the number of workers. Memory is bounded: at most two blocks a worker are under way.
"""

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megakd.data.blocks import Block, read_blocks
from megakd.data.chat_template import BadRecord
from megakd.data.encoding import Ends, encode_in_parts, encode_whole, tokens_inside
from megakd.data.formats import Sample, SampleFormat, build_formatter, check_format, detect_format
from megakd.data.records import Problems, records_of
from megakd.data.token_files.writer import TokenFileWriter
from megakd.data.tokenizers.load import load_tokenizer
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError
from megakd.processes import follow_parent
from megakd.progress import progress_bar

SHORTENED = "prompts are shortened (data.truncation)"
_POOL_BYTES = 1 << 23  # smaller inputs are done before the workers have started
_NO_IDS, _NO_MASK = np.zeros(0, np.int32), np.zeros(0, bool)
_ENCODER: "Encoder"  # a worker process's own, made once when it starts


@dataclass
class Encoded:
    """The samples of one block.

    Attributes:
        ids, mask: of all samples in a row.
        lengths: ids of each sample.
        continues: the first is the rest of the sample before.
        problems: records that cannot be used.
        empty: how many records held no text.
        notes: what of the records was not used, and in how many of them.
        columns: keys of data.columns that a record has.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    continues: bool
    problems: Problems
    empty: int
    notes: Counter
    columns: set[str]


@dataclass(frozen=True)
class Summary:
    """What a tokenization did.

    Attributes:
        documents, tokens, supervised: written.
        empty: records without any token, left out.
        problems: records that could not be used (only with on_error "skip"; else they have been raised).
        notes: what of the records was not used, and in how many of them.
        input_bytes, seconds: what was read, and how long all of it took.
    """

    documents: int
    tokens: int
    supervised: int
    empty: int
    problems: Problems
    notes: Counter
    input_bytes: int
    seconds: float

    @property
    def unused(self) -> str:
        """The notes in one sentence; "" if everything was used."""
        return "; ".join(f"{note} ({count:,})" if count else note for note, count in sorted(self.notes.items()))

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
        self._formatted = build_formatter(sample_format, self._tokenizer)

    def __call__(self, block: Block, only_check: bool) -> Encoded:
        """Encode one block; with `only_check` records are only read and formatted, to find what is wrong."""
        made = Encoded(_NO_IDS, _NO_MASK, _NO_IDS, block.continues, Problems(), 0, Counter(), set())
        if block.continues and self._format.name != "text":
            return made  # its beginning has been named as a record without the format's keys
        rows, masks = [_NO_IDS], [_NO_MASK]
        for where, record in records_of(block, made.problems):
            made.columns |= record.keys() & self._format.columns.values()
            try:
                sample = self._formatted(record)
                if only_check:
                    continue
                ids, mask, notes = encode_sample(
                    sample, self._tokenizer, self._format,
                    continues=block.continues, continued=block.continued,
                )  # fmt: skip
            except (BadRecord, DataError) as error:  # DataError: the tokenizer cannot encode it, or a limit is met
                made.problems.add(where, str(error).replace("\nhint: ", "; "))
                continue
            made.notes.update({*sample.notes, *notes})
            if sample.ids or any(segment.text for segment in sample.segments):
                rows.append(ids)
                masks.append(mask)
            else:
                made.empty += 1
        made.ids, made.mask = np.concatenate(rows), np.concatenate(masks)
        made.lengths = np.fromiter(map(len, rows[1:]), np.int32, len(rows) - 1)
        return made


def encode_sample(
    sample: Sample,
    tokenizer: Tokenizer,
    sample_format: SampleFormat,
    *,
    continues: bool = False,
    continued: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ids of a sample, for each whether it is supervised, and what of its text is not learnt though it should be.

    Args:
        continues, continued: the sample goes on from a text before, and in one behind.

    Raises:
        BadRecord: see `encoding`; or nothing is left to learn.
    """
    if sample.ids is not None:
        learnt = [segment.supervised for segment in sample.segments]
        ids = np.concatenate([np.asarray(part, np.int32) for part in sample.ids])
        return ids, np.repeat(learnt, [*map(len, sample.ids)]), []
    if sample_format.name == "messages":
        ids, mask, notes = encode_whole(sample.segments, tokenizer)
        if not mask.any():
            raise BadRecord("nothing to learn from: no token is an answer's alone")
        if sample_format.strict and notes:
            raise BadRecord(f"{'; '.join(notes)} (data.strict)")
        return ids, mask, notes
    bos = tokenizer.bos_id if sample_format.has_ends and sample_format.add_bos and not continues else None
    eos = tokenizer.eos_id if sample_format.has_ends and sample_format.add_eos and not continued else None
    special = sample_format.name != "text"
    ends = Ends(bos, eos)
    ids, mask = encode_in_parts(sample.segments, tokenizer, special=special, ends=ends, continues=continues)
    over = len(ids) - (sample_format.most_tokens or len(ids))
    if over > 0 and sample.shortened:
        left_out = tokens_inside(sample.segments[0].text, sample.shortened, tokenizer) + (bos is not None)
        left_out = left_out[:over] if sample_format.truncation == "left" else left_out[-over:]
        return np.delete(ids, left_out), np.delete(mask, left_out), [SHORTENED]
    return ids, mask, []


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
    started, problems, empty, notes, columns = time.monotonic(), Problems(on_error), 0, Counter(), set()
    total = sum(path.stat().st_size for path in files)
    if workers is not None and workers < 1:
        raise DataError(f"{workers} processes cannot tokenize anything", hint="--workers (data.workers) is 1 or more")
    count = workers or len(os.sched_getaffinity(0))
    writer = TokenFileWriter(
        prefix,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_appended=sample_format.add_eos and sample_format.has_ends,
        masked=sample_format.name != "text",
        made_from=sample_format.relevant(tokenizer),
    )
    with writer, _encoding(tokenizer.files[0], sample_format, count if total > _POOL_BYTES else 1) as encode:
        blocks = _with_progress(read_blocks(files), total, progress)
        for encoded in encode(blocks, lambda: bool(problems.count) and on_error == "raise"):
            problems.extend(encoded.problems)
            empty += encoded.empty
            notes += encoded.notes
            columns |= encoded.columns
            if encoded.lengths.size:
                mask = encoded.mask if sample_format.name != "text" else None
                writer.add_many(encoded.ids, encoded.lengths, mask, continues=encoded.continues)
        problems.check()
        notes.update(_missing_columns(sample_format, columns))
        writer.skipped = problems.count
    seconds = time.monotonic() - started
    return Summary(writer.documents, writer.tokens, writer.supervised, empty, problems, notes, total, seconds)


def _missing_columns(sample_format: SampleFormat, found: set[str]) -> dict[str, int]:
    """Notes about mapped columns that no record has.

    Raises:
        DataError: there is one, and the format is strict.
    """
    notes = {
        f'no record has "{key}", which data.columns gives for {name}': 0
        for name, key in sample_format.columns.items()
        if key not in found
    }
    if notes and sample_format.strict:
        raise DataError(f"{'; '.join(notes)} (data.strict)", hint="leave it out of data.columns, or correct its name")
    return notes


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
