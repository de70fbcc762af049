"""Records from files: JSON lines, Parquet, Arrow, whole text files; read in blocks that are handed to worker processes.

A record is a dict; a text file is one record {"text": ...}. What cannot be read becomes a problem with its place, never
an exception, so that one pass names everything that is wrong.
"""

import contextlib
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megakd.errors import DataError
from megakd.publish import publishing

SHOWN = 10
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz")
TABLE_SUFFIXES = (".parquet", ".arrow")
RECORD_SUFFIXES = (*LINE_SUFFIXES, *TABLE_SUFFIXES)
TEXT_SUFFIXES = (".txt", ".md", ".py")
DEFAULT_SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)  # not .json, which in folders of data describes it
BLOCK_BYTES = 1 << 22


@dataclass
class Problems:
    """What is wrong with the input: the first few in words, the rest counted, so that one pass names them all.

    Attributes:
        on_error: "raise" (`check` raises if there was any) or "skip" (the records are left out and counted).
        count: records that could not be used.
        shown: the first `SHOWN` of them, each `WHERE: WHAT`.
    """

    on_error: str = "raise"
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Record one unusable record."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{where}: {what}")

    def extend(self, other: "Problems") -> None:
        """Append the problems of a later part of the input."""
        self.count += other.count
        self.shown = [*self.shown, *other.shown][:SHOWN]

    def __str__(self) -> str:
        rest = self.count - len(self.shown)
        return "\n".join([*(f"  {line}" for line in self.shown), *([f"  and {rest} more"] if rest else [])])

    def check(self) -> None:
        """Raise a DataError naming the problems if there are any and they are not to be skipped."""
        if self.count and self.on_error == "raise":
            noun = "record" if self.count == 1 else "records"
            raise DataError(
                f"{self.count} {noun} of the input cannot be used:\n{self}",
                hint="mend the input, or leave these records out: --on-error skip (data.on_error=skip in a run)",
            )


@dataclass(frozen=True)
class Block:
    """A part of one file, small enough to hold several of in memory.

    Attributes:
        kind: "lines" (whole JSON lines), "text" (a whole text file) or "table" (an Arrow stream).
        path: the file.
        first: number of its first line or row, from 1.
        content: its bytes.
        input_bytes: how much of the file it stands for (the blocks of a file add up to its size).
    """

    kind: str
    path: str
    first: int
    content: bytes
    input_bytes: int


def find_files(inputs: Sequence[str | Path], suffixes: Sequence[str] = DEFAULT_SUFFIXES) -> list[Path]:
    """Expand files and folders into files: a named file is always taken, a folder gives those with one of `suffixes`.

    Folders are searched to any depth, without following links to folders, in the order of sorted relative paths. A
    folder that Hugging Face datasets saved gives the files of its `state.json`, in their order.

    Raises:
        DataError: an input does not exist, or there is no file at all.
    """
    files: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_file():
            files.append(entry)
        elif entry.is_dir():
            found = [path for path in entry.rglob("*") if path.name.endswith(tuple(suffixes)) and path.is_file()]
            files += _saved_dataset(entry) or sorted(found, key=lambda path: path.relative_to(entry).as_posix())
        else:
            raise DataError(f"input {entry} does not exist", hint="give a file or a folder")
    if not files:
        raise DataError(
            f"no {', '.join(suffixes)} file in {', '.join(map(str, inputs)) or 'nothing'}",
            hint="other endings are named with --suffix .c,.h",
        )
    return files


def _saved_dataset(folder: Path) -> list[Path]:
    """The data files of a folder written by `Dataset.save_to_disk`, or none if it is another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise DataError(f"{folder} holds the splits {', '.join(splits)}", hint=f"name one: {folder / splits[0]}")
    if not (folder / "dataset_info.json").is_file() or not (folder / "state.json").is_file():
        return []
    state = json.loads((folder / "state.json").read_text())
    return [folder / entry["filename"] for entry in state["_data_files"]]


def read_blocks(files: Iterable[Path], block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Stream files as blocks of about `block_bytes`; a longer line, row or text file is a block of its own.

    Raises:
        DataError: a file cannot be opened, or is no Parquet or Arrow file though named so.
    """
    for path in files:
        try:
            if path.name.endswith((*LINE_SUFFIXES, ".json")):
                yield from _line_blocks(path, block_bytes)
            elif path.suffix in TABLE_SUFFIXES:
                yield from _table_blocks(path, block_bytes)
            else:
                content = path.read_bytes()
                yield Block("text", str(path), 1, content, len(content))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except EOFError as error:
            raise DataError(f"cannot read {path}: {error}", hint="the file was copied incompletely") from error


def _line_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else contextlib.nullcontext(raw) as lines:
        first, place = 1, 0
        while content := lines.read(block_bytes):
            content += lines.readline() if not content.endswith(b"\n") else b""
            yield Block("lines", str(path), first, content, raw.tell() - place)
            first, place = first + content.count(b"\n"), raw.tell()


def _table_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, first, place = path.stat().st_size, 1, 0
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            rows, batches = file.metadata.num_rows, file.iter_batches(batch_size=1024)
        else:
            rows, batches = _arrow_batches(path)
        for whole in batches:
            step = max(1, whole.num_rows * block_bytes // max(1, whole.nbytes))
            for start in range(0, whole.num_rows, step):
                batch = whole.slice(start, step)
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_batch(batch)
                end = size * (first + batch.num_rows - 1) // max(1, rows)
                yield Block("table", str(path), first, sink.getvalue().to_pybytes(), end - place)
                first, place = first + batch.num_rows, end
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a {path.suffix[1:]} file ({error})", hint="copy the file again") from error


def _arrow_batches(path: Path):
    """(rows, batches) of an Arrow file in either form: IPC file, or IPC stream as Hugging Face datasets writes."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        file = pa.ipc.open_file(source)
        count = file.num_record_batches
        rows = sum(file.get_batch(number).num_rows for number in range(count))
        return rows, (file.get_batch(number) for number in range(count))
    except pa.ArrowInvalid:
        source.seek(0)
        rows = sum(batch.num_rows for batch in pa.ipc.open_stream(source))
        source.seek(0)
        return rows, iter(pa.ipc.open_stream(source))


def records_of(block: Block, problems: Problems) -> Iterator[tuple[str, dict]]:
    """The records of a block with their places (`FILE`, `FILE:LINE` or `FILE: row N`).

    Line ends inside texts are kept as they are; a byte order mark at the start of a file is dropped; blank lines are
    ignored. What is no record is added to `problems`.
    """
    if block.kind == "table":
        import pyarrow as pa

        rows = pa.ipc.open_stream(block.content).read_all().to_pylist()
        yield from ((f"{block.path}: row {number}", row) for number, row in enumerate(rows, block.first))
    elif block.kind == "text":
        text = _decode(block.content, block.path, 1, problems)
        if text is not None:
            yield block.path, {"text": text}
    else:
        for number, line in enumerate(block.content.split(b"\n"), block.first):
            where = f"{block.path}:{number}"
            text = _decode(line, where, number, problems) if line.strip() else None
            if text is None:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                problems.add(where, f"broken JSON, {error}")
                continue
            if isinstance(record, dict):
                yield where, record
            else:
                problems.add(where, f"a {type(record).__name__}, not an object with keys")


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write JSON lines; a file of that name is whole (megakd.publish)."""
    with publishing(path) as incomplete, incomplete.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _decode(content: bytes, where: str, line: int, problems: Problems) -> str | None:
    """UTF-8 text of `content`, which starts on `line`; None after naming the first byte that is not."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        problems.add(
            where, f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}, line {line} ({error.reason})"
        )
        return None
    return text.removeprefix("\ufeff") if line == 1 else text
