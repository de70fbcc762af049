"""Which files an input means, and what kind of content an ending promises."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from megakd.errors import DataError

COMPRESSIONS = (".gz", ".zst")
KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "fields", ".tsv": "fields", ".parquet": "table",
    ".arrow": "table", ".txt": "text", ".md": "text", ".py": "text",
}  # fmt: skip
TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
DEFAULT_SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)  # not .json and .csv, which in folders of data describe it
OTHER_SUFFIXES = (".json", ".csv", ".tsv")
_ADVICE = {
    ".bin": "name a token file by its prefix, without .bin",
    ".idx": "name a token file by its prefix, without .idx",
    ".zip": "unpack it first", ".tar": "unpack it first", ".tgz": "unpack it first", ".xz": "unpack it first",
    ".bz2": "unpack it first", ".xlsx": "save it as CSV", ".xls": "save it as CSV",
    ".pkl": "write it as JSON lines or Parquet", ".npy": "write it as JSON lines or Parquet",
}  # fmt: skip


def kind_of(path: Path) -> str | None:
    """What a file holds by its ending: "lines", "json", "fields", "table" or "text"; None for an unknown ending."""
    name = path.name
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    kind = KINDS.get(Path(name).suffix)
    return None if kind == "table" and name != path.name else kind


def find_files(inputs: Sequence[str | Path], suffixes: Sequence[str] = DEFAULT_SUFFIXES) -> list[Path]:
    """Expand files, patterns and folders into files.

    A file that is named must have one of `suffixes` or a known ending; a folder gives those with one of `suffixes`.
    Folders are searched to any depth, without following links to folders, in the order of sorted relative paths. A
    folder that Hugging Face datasets saved gives the files of its `state.json`, in their order. A pattern (`*`, `?`,
    `[...]`, `**` for any depth) gives what it matches, sorted.

    Raises:
        DataError: an input does not exist, a named file is of unknown kind, or there is no file at all.
    """
    files: list[Path] = []
    for entry in [path for given in inputs for path in _matches(given)]:
        if entry.is_file():
            if not entry.name.endswith(tuple(suffixes)):
                _check_ending(entry)
            files.append(entry)
        elif entry.is_dir():
            found = [path for path in entry.rglob("*") if path.name.endswith(tuple(suffixes)) and path.is_file()]
            files += _saved_dataset(entry) or sorted(found, key=lambda path: path.relative_to(entry).as_posix())
        else:
            raise DataError(
                f"input {entry} does not exist", hint="give a file, a folder or a pattern such as 'a/*.jsonl'"
            )
    if not files:
        raise DataError(
            f"no {', '.join(suffixes)} file in {', '.join(map(str, inputs)) or 'nothing'}",
            hint="other endings are named with --suffix .c,.h",
        )
    return files


def is_pattern(path: str | Path) -> bool:
    """Whether a path stands for what it matches, and is no file or folder itself."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def fixed_part(pattern: str | Path) -> Path:
    """The folder of a pattern above its first wildcard."""
    parts = Path(pattern).parts
    first = next(number for number, name in enumerate(parts) if glob.has_magic(name))
    return Path(*parts[:first])


def _matches(given: str | Path) -> list[Path]:
    if not is_pattern(given):
        return [Path(given)]
    found = sorted(glob.glob(str(given), recursive=True))
    if not found:
        raise DataError(f"nothing matches {given}", hint="quote a pattern, so that the shell leaves it alone")
    return [Path(path) for path in found]


def _check_ending(path: Path) -> None:
    if kind_of(path) is None:
        ending = path.suffix or path.name
        advice = _ADVICE.get(path.suffix, f"rename it, or read it as text with `megakd prepare --suffix {ending}`")
        raise DataError(
            f"{path}: what a file with the ending {ending} holds is not known",
            hint=f"{advice}. Known are {', '.join(KINDS)}; all but Parquet and Arrow also with "
            f"{' or '.join(COMPRESSIONS)} behind",
        )


def _saved_dataset(folder: Path) -> list[Path]:
    """The data files of a folder written by `Dataset.save_to_disk`, or none if it is another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _described(folder / "dataset_dict.json", "splits")
        raise DataError(f"{folder} holds the splits {', '.join(splits)}", hint=f"name one: {folder / splits[0]}")
    if not (folder / "dataset_info.json").is_file() or not (folder / "state.json").is_file():
        return []
    return [folder / entry["filename"] for entry in _described(folder / "state.json", "_data_files")]


def _described(path: Path, key: str) -> list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {error!r}", hint="save the data set again, or name its files"
        ) from error
