"""Files as blocks, small enough to hold several of in memory, that are handed to worker processes.

lines, json    JSON lines; an array of objects, or objects one after the other
fields         CSV and TSV with a line of names
table          Parquet, Arrow
text           a document, in pieces where it is long
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import mmap
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megakd.data.files import kind_of
from megakd.errors import DataError

BLOCK_BYTES = 1 << 22
PIECE_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Block:
    """A part of one file.

    Attributes:
        kind: "lines" (whole JSON lines), "items" (the elements of a JSON array, a line each), "fields" (JSON: the
            names, and rows with their line numbers), "table" (an Arrow stream), "text" (a text or a piece of it) or
            "problem" (why the file cannot be used, in words).
        path: the file.
        first: number of its first line, element or row, from 1.
        content: its bytes.
        input_bytes: how much of the file it stands for (the blocks of a file add up to its size).
        continues, continued: whether the text goes on from the block before, and into the next.
    """

    kind: str
    path: str
    first: int
    content: bytes
    input_bytes: int
    continues: bool = False
    continued: bool = False


def read_blocks(files: Iterable[Path], block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Stream files as blocks of about `block_bytes`; a longer line or row is a block of its own.

    Raises:
        DataError: a file cannot be opened, or is not what its ending says.
    """
    readers = {"lines": _line_blocks, "json": _json_blocks, "fields": _field_blocks, "table": _table_blocks}
    for path in files:
        try:
            yield from readers.get(kind_of(path), _text_blocks)(path, block_bytes)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except (EOFError, zlib.error, ValueError) as error:  # ValueError: Arrow's of a damaged file
            raise DataError(
                f"{path} is not the {path.suffix} file that its ending says, or damaged ({error})",
                hint="the file was copied incompletely: copy it again",
            ) from error


class _Opened:
    """A file's bytes, decompressed, and how much of the file has been read since it was last asked."""

    def __init__(self, path: Path, stack: contextlib.ExitStack):
        self._raw = stack.enter_context(path.open("rb"))
        self._place = 0
        self.bytes = self._raw
        if path.suffix == ".gz":
            self.bytes = stack.enter_context(gzip.GzipFile(fileobj=self._raw))
        elif path.suffix == ".zst":
            import pyarrow as pa

            unpacked = pa.CompressedInputStream(pa.PythonFile(self._raw), "zstd")
            self.bytes = stack.enter_context(io.BufferedReader(unpacked, 1 << 16))

    def text(self, stack: contextlib.ExitStack) -> io.TextIOWrapper:
        """As text, line ends kept; bytes that are no UTF-8 become halves of surrogate pairs."""
        return stack.enter_context(io.TextIOWrapper(self.bytes, "utf-8-sig", "surrogateescape", newline=""))

    def advance(self) -> int:
        before, self._place = self._place, self._raw.tell()
        return self._place - before


def _line_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    with contextlib.ExitStack() as stack:
        file, first = _Opened(path, stack), 1
        while content := file.bytes.read(block_bytes):
            content += file.bytes.readline() if not content.endswith(b"\n") else b""
            yield Block("lines", str(path), first, content, file.advance())
            first += content.count(b"\n")


def _json_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    """Blocks of a .json file, which may be JSON lines under another name."""
    with contextlib.ExitStack() as stack:
        start = _Opened(path, stack).text(stack).read(1 << 16).lstrip()
    with contextlib.suppress(ValueError):
        json.loads(start.partition("\n")[0])
        if not start.startswith("["):
            yield from _line_blocks(path, block_bytes)
            return
    with contextlib.ExitStack() as stack:
        file, first, items, size = _Opened(path, stack), 1, [], 0
        for item in _json_items(file.text(stack), block_bytes):
            items.append(item.replace("\r", " ").replace("\n", " ").encode("utf-8", "surrogateescape"))
            size += len(items[-1])
            if size >= block_bytes:
                yield Block("items", str(path), first, b"\n".join(items), file.advance())
                first, items, size = first + len(items), [], 0
        yield Block("items", str(path), first, b"\n".join(items), file.advance())


def _json_items(text: io.TextIOBase, chunk: int) -> Iterator[str]:
    """The JSON texts of an array's elements, or of values one after the other; what is no JSON is the last of them."""
    decoder, buffer, place, inside = json.JSONDecoder(), text.read(chunk), 0, False
    while True:
        while place < len(buffer) and (buffer[place].isspace() or (inside and buffer[place] in ",]")):
            inside = inside and buffer[place] != "]"
            place += 1
        if place == len(buffer):
            buffer, place = text.read(chunk), 0
            if not buffer:
                return
        elif not inside and buffer[place] == "[":
            inside, place = True, place + 1
        else:
            try:
                stop = decoder.raw_decode(buffer, place)[1]
            except (ValueError, RecursionError):
                stop = len(buffer)
            if stop == len(buffer) and (more := text.read(max(chunk, stop - place))):
                buffer, place = buffer[place:] + more, 0  # a value may go on in what follows
                continue
            yield buffer[place:stop]
            place = stop


def _field_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    csv.field_size_limit(sys.maxsize)
    with contextlib.ExitStack() as stack:
        file = _Opened(path, stack)
        rows = csv.reader(file.text(stack), delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have one name: {', '.join(names)}", hint="rename one")
            first, taken, size = rows.line_num + 1, [], 0
            for row in rows:
                if row:
                    taken.append([rows.line_num, *row])
                size += sum(map(len, row))
                if size >= block_bytes:
                    yield _fields(path, first, names, taken, file.advance())
                    first, taken, size = rows.line_num + 1, [], 0
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: broken CSV, {error}", hint="mend the line") from error
        yield _fields(path, first, names, taken, file.advance())


def _fields(path: Path, first: int, names: list[str], rows: list[list], input_bytes: int) -> Block:
    return Block("fields", str(path), first, json.dumps({"names": names, "rows": rows}).encode(), input_bytes)


def _table_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, first, place = path.stat().st_size, 1, 0
    with path.open("rb") as content:  # opened here: Arrow itself opens no file whose name is no UTF-8
        if path.suffix == ".parquet":
            file = pq.ParquetFile(content)
            rows, batches = file.metadata.num_rows, file.iter_batches(batch_size=1024)
        else:
            mapped = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
            rows, batches = _arrow_batches(pa.BufferReader(mapped))
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


def _arrow_batches(content):
    """(rows, batches) of an Arrow file in either form: IPC file, or IPC stream as Hugging Face datasets writes."""
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(content)
        count = file.num_record_batches
        rows = sum(file.get_batch(number).num_rows for number in range(count))
        return rows, (file.get_batch(number) for number in range(count))
    except pa.ArrowInvalid:
        content.seek(0)
        rows = sum(batch.num_rows for batch in pa.ipc.open_stream(content))
        content.seek(0)
        return rows, iter(pa.ipc.open_stream(content))


def _text_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    """The pieces of a text; read twice, so that nothing of a text that is no UTF-8 is handed out."""
    if problem := _not_utf8(path):
        yield Block("problem", str(path), 1, problem.encode(), path.stat().st_size)
        return
    with contextlib.ExitStack() as stack:
        file, text, started = _Opened(path, stack), "", False
        decode = codecs.getincrementaldecoder("utf-8")().decode
        while content := file.bytes.read(PIECE_CHARACTERS):
            text += decode(content)
            text = text if started else text.removeprefix("\ufeff")
            *whole, text = pieces(text)
            for piece in whole:
                yield Block("text", str(path), 1, piece.encode(), file.advance(), started, True)
                started = True
        yield Block("text", str(path), 1, text.encode(), file.advance(), started, False)


def pieces(text: str, most: int = PIECE_CHARACTERS) -> Iterator[str]:
    """A text in pieces of at most `most` characters; if half of that holds no space between words, cut anywhere."""
    start = 0
    while len(text) - start > most:
        cut = text.rfind(" ", start + most // 2, start + most)
        while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind(" ", start + most // 2, cut)
        stop = cut if cut > 0 else start + most
        yield text[start:stop]
        start = stop
    yield text[start:]


def _not_utf8(path: Path) -> str | None:
    """Where a file holds the first byte that is no UTF-8, in words."""
    with contextlib.ExitStack() as stack:
        file, offset, line = _Opened(path, stack), 0, 1
        rest = b""
        while True:
            more = file.bytes.read(PIECE_CHARACTERS)
            content = rest + more
            try:
                used = codecs.utf_8_decode(content, "strict", not more)[1]
            except UnicodeDecodeError as error:
                return not_utf8(content, error, offset, line)
            offset, line, rest = offset + used, line + content.count(b"\n", 0, used), content[used:]
            if not more:
                return None


def not_utf8(content: bytes, error: UnicodeDecodeError, offset: int = 0, line: int = 1) -> str:
    """A sentence about a byte that is no UTF-8, in content that begins at an offset, on a line."""
    line += content.count(b"\n", 0, error.start)
    byte = content[error.start]
    return f"not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}, line {line} ({error.reason})"
