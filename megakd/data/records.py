"""The records of a block of a file: a record is a dict, a text is one record {"text": ...}.

What cannot be read becomes a problem with its place, never an exception, so that one pass names everything wrong.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megakd.data.blocks import Block, not_utf8
from megakd.errors import DataError
from megakd.publish import publishing

SHOWN = 10


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


def records_of(block: Block, problems: Problems) -> Iterator[tuple[str, dict]]:
    """The records of a block with their places (`FILE`, `FILE:LINE`, `FILE: item N` or `FILE: row N`).

    Line ends inside texts are kept as they are; a byte order mark at the start of a file is dropped; blank lines are
    ignored. What is no record is added to `problems`.
    """
    if block.kind == "problem":
        problems.add(block.path, block.content.decode())
    elif block.kind == "text":
        yield block.path, {"text": block.content.decode()}
    elif block.kind == "table":
        yield from _rows(block, problems)
    elif block.kind == "fields":
        yield from _fields(block, problems)
    else:
        place = f"{block.path}:" if block.kind == "lines" else f"{block.path}: item "
        for number, line in enumerate(block.content.split(b"\n"), block.first):
            where = f"{place}{number}"
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


def _rows(block: Block, problems: Problems) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa

    table = pa.ipc.open_stream(block.content).read_all()
    try:
        yield from ((f"{block.path}: row {number}", row) for number, row in enumerate(table.to_pylist(), block.first))
        return
    except UnicodeDecodeError:
        pass  # row by row, to name the wrong ones
    for number in range(table.num_rows):
        where = f"{block.path}: row {block.first + number}"
        try:
            (row,) = table.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            problems.add(where, not_utf8(error.object, error))
            continue
        yield where, row


def _fields(block: Block, problems: Problems) -> Iterator[tuple[str, dict]]:
    content = json.loads(block.content)
    for line, *values in content["rows"]:
        where = f"{block.path}:{line}"
        if len(values) != len(content["names"]):
            problems.add(where, f"{len(values)} fields, the line of names has {len(content['names'])}")
            continue
        try:
            "".join(values).encode()
        except UnicodeEncodeError as error:
            problems.add(where, f"not UTF-8: byte 0x{ord(error.object[error.start]) - 0xDC00:02x}")
            continue
        yield where, dict(zip(content["names"], values, strict=True))


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write JSON lines; a file of that name is whole (megakd.publish)."""
    with publishing(path) as incomplete, incomplete.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _decode(content: bytes, where: str, line: int, problems: Problems) -> str | None:
    """UTF-8 text of `content`, which starts on `line`; None after naming the first byte that is not."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.add(where, not_utf8(content, error, line=line))
        return None
    return text.removeprefix("\ufeff") if line == 1 else text
