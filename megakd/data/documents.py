"""Raw text as a stream of documents: text files (one document each) and JSONL `{"text": ...}` (one document a line)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megakd.errors import DataError

SHOWN = 10
DEFAULT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text with where it came from (`FILE` or `FILE:LINE`) and the bytes of input it stands for."""

    text: str
    origin: str
    input_bytes: int


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

    def __str__(self) -> str:
        rest = self.count - len(self.shown)
        return "\n".join([*(f"  {line}" for line in self.shown), *([f"  and {rest} more"] if rest else [])])

    def check(self) -> None:
        """Raise a DataError naming the problems if there are any and they are not to be skipped."""
        if self.count and self.on_error == "raise":
            noun = "record" if self.count == 1 else "records"
            raise DataError(
                f"{self.count} {noun} of the input cannot be used:\n{self}",
                hint="mend the input, or leave these records out with --on-error skip",
            )


def find_files(inputs: Sequence[str | Path], suffixes: Sequence[str] = DEFAULT_SUFFIXES) -> list[Path]:
    """Expand files and folders into files: a named file is always taken, a folder gives those with one of `suffixes`.

    Folders are searched to any depth, without following links to folders, in the order of sorted relative paths.

    Raises:
        DataError: an input does not exist, or there is no file at all.
    """
    files: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_file():
            files.append(entry)
        elif entry.is_dir():
            found = [path for path in entry.rglob("*") if path.suffix in suffixes and path.is_file()]
            files += sorted(found, key=lambda path: path.relative_to(entry).as_posix())
        else:
            raise DataError(f"input {entry} does not exist", hint="--input takes files and folders")
    if not files:
        raise DataError(
            f"no {', '.join(suffixes)} file in {', '.join(map(str, inputs)) or 'nothing'}",
            hint="other endings are named with --suffix .c,.h",
        )
    return files


def read_documents(files: Iterable[Path], problems: Problems) -> Iterator[Document]:
    """Stream the documents of `files` in order; what cannot be read is added to `problems` and left out.

    A `.jsonl` file holds one document a line under the key "text" (blank lines are ignored); any other file is one
    document. Line ends are kept as they are; a byte order mark at the start of a file is dropped.

    Raises:
        DataError: a file cannot be opened.
    """
    for path in files:
        try:
            if path.suffix == ".jsonl":
                yield from _read_jsonl(path, problems)
            else:
                content = path.read_bytes()
                text = _decode(content, str(path), 1, problems)
                if text is not None:
                    yield Document(text, str(path), len(content))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_jsonl(path: Path, problems: Problems) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            content = _decode(line, where, number, problems)
            if content is None or not content.strip():
                continue
            try:
                record = json.loads(content)
            except (json.JSONDecodeError, RecursionError) as error:
                problems.add(where, f"broken JSON, {error}")
                continue
            if not isinstance(record, dict) or "text" not in record:
                keys = ", ".join(sorted(record)) if isinstance(record, dict) else f"a {type(record).__name__}"
                problems.add(where, f'no key "text" (found {keys or "an empty object"})')
            elif not isinstance(record["text"], str):
                problems.add(where, f'"text" is a {type(record["text"]).__name__}, not a string')
            elif not _is_unicode(record["text"]):
                problems.add(where, '"text" holds a lone surrogate (half of a \\ud83d\\ude00-like pair)')
            else:
                yield Document(record["text"], where, len(line))


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


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
