"""What `data.train` and `data.validation` name, opened: token files, raw files that are tokenized first, blends.

A raw file or folder PATH is tokenized once, into PATH.megakd/KEY.bin and so on (or into data.index_dir); KEY is a hash
of the data, the tokenizer and what the format depends on. A changed file, tokenizer or template is another index.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from megakd.config import Data
from megakd.data.blend import BlendedDataset
from megakd.data.dataset import TextDataset
from megakd.data.files import (
    KINDS,
    OTHER_SUFFIXES,
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    find_files,
    fixed_part,
    is_pattern,
    kind_of,
)
from megakd.data.formats import TEMPLATED, SampleFormat
from megakd.data.nemo_chat import ChatTokens
from megakd.data.samples import PackedDataset, SampleDataset
from megakd.data.token_files.layout import is_prefix, load_info, part
from megakd.data.token_files.reader import TokenFile
from megakd.data.tokenization import detect, write_token_file
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import ConfigError, DataError
from megakd.ownership import owning
from megakd.publish import publish_text

LOG = logging.getLogger("megakd")
_ENCODING = 2  # version of how samples are encoded; part of every key
_CHUNK_BYTES = 1 << 20


def open_data(data: Data, source, tokenizer: Tokenizer, seed: int | None, *, build: bool = True, progress: bool = True):
    """Open what a run reads.

    Args:
        data: the config's section.
        source: data.train or data.validation: a path, paths, or a blend [weight, path, weight, path, ...].
        tokenizer: the run's.
        seed: orders documents and packs; None for validation: stored order, nothing packed, each part once whatever its
            weight.
        build: tokenize what has not been yet; else expect that another rank has done it.
        progress: show bars.

    Returns:
        A dataset for `load_batch`: `len`, `sequence_length`, `sample`, `length`, `counts`.

    Raises:
        DataError: see `write_token_file`, `TokenFile`.
    """
    paths, weights = parse_source(source)
    parts = []
    for path in paths:
        prefix = path if is_prefix(path) else find_index(data, path, tokenizer, build, progress)
        parts.append(_open(data, prefix, tokenizer, seed))
    if len(parts) == 1:
        return parts[0]
    return BlendedDataset(parts, None if seed is None else weights, seed or 0, by_tokens=data.weights_of == "tokens")


def parse_source(source) -> tuple[list[str], list[float] | None]:
    """(paths, weights) of a path, a list of paths, a list of weights and paths by turns, or None."""
    if source is None:
        return [], None
    if isinstance(source, str):
        return [source], None
    if all(isinstance(item, str) for item in source):
        return list(source), None
    weights, paths = list(source[::2]), list(source[1::2])
    return paths, [float(weight) for weight in weights]


def order_version(data: Data) -> int:
    """Which order samples of data.train come in for a seed: a resumed run must go on in the one that it began with.

    Of weighted blends: 1 until they kept their proportions at every sample, 2 since. Of all other data: 1.
    """
    paths, weights = parse_source(data.train)
    return 2 if weights is not None and len(paths) > 1 else 1


def _open(data: Data, prefix: str | Path, tokenizer: Tokenizer, seed: int | None):
    if not load_info(prefix).masked:
        text = TextDataset(prefix, data.sequence_length, seed, tokenizer.fingerprint)
        _check_end(text.file, tokenizer)
        return text
    samples = SampleDataset(prefix, data.sequence_length, tokenizer.fingerprint)
    _check_end(samples.file, tokenizer)
    counts = samples.counts
    if counts["truncated"] or counts["dropped"] or counts["skipped"]:
        LOG.warning(
            "%s: of %s samples %s are cut to %s tokens; %s more are dropped, their answer lies beyond; %s records of "
            "the input were left out as unusable",
            prefix, *(f"{n:,}" for n in (counts["samples"], counts["truncated"], data.sequence_length + 1,
                                         counts["dropped"], counts["skipped"])),
        )  # fmt: skip
    if seed is None or not data.packing:
        return samples
    packed = PackedDataset(samples, seed)
    LOG.info(
        "%s: %s samples packed into %s, %.1f %% full",
        prefix,
        f"{len(samples):,}",
        f"{len(packed):,}",
        100 * packed.fill,
    )
    return packed


def _check_end(file: TokenFile, tokenizer: Tokenizer) -> None:
    """Raise a DataError if the documents of a token file end with another token than the tokenizer's eos."""
    if file.info.eos_appended and len(file) and file.lengths[0]:
        last = int(file.document(0)[-1])
        if last != tokenizer.eos_id:
            raise DataError(
                f"the documents of {file.prefix} end with token {last}, the eos of tokenizer {tokenizer.files[0]} is "
                f"{tokenizer.eos_id}",
                hint="its settings have changed since: prepare the data again, or undo the change",
            )


def find_index(data: Data, path: str | Path, tokenizer: Tokenizer, build: bool = True, progress: bool = True) -> Path:
    """The prefix of the token file that belongs to a raw file or folder, made first if it is not there.

    One process makes it while others that ask for it wait.

    Raises:
        DataError: see `write_token_file`; or it is not there and `build` is false.
    """
    files = data_files(path)
    sample_format = choose_format(data, files)
    beside = fixed_part(path) if is_pattern(path) else Path(str(path).rstrip("/"))
    folder = Path(data.index_dir) if data.index_dir else beside.absolute().with_name(f"{beside.absolute().name}.megakd")
    try:
        with _locked(folder):
            prefix = folder / _key(files, folder / "digests.json", tokenizer, sample_format, data.on_error)
            if part(prefix, ".json").exists():
                return prefix
            if not build:
                raise DataError(f"{path} has no index for this run in {folder}", hint="the rank that makes it failed")
            LOG.info("tokenizing %s as %s into %s", path, sample_format.name, prefix)
            if given := _without_use(data, sample_format.name):
                LOG.info("%s: %s has no use for %s", path, sample_format.name, ", ".join(given))
            summary = write_token_file(
                files, prefix, tokenizer, sample_format,
                on_error=data.on_error, workers=data.workers, progress=progress,
            )  # fmt: skip
            LOG.info("%s: %s", path, summary)
            if summary.unused:
                LOG.warning("%s: %s; data.strict=true refuses such records", path, summary.unused)
            return prefix
    except OSError as error:
        raise DataError(
            f"the index of {path} cannot be written: {error.strerror or error} ({error.filename or folder})",
            hint="data.index_dir names another folder for it",
        ) from error


def data_files(path: str | Path) -> list[Path]:
    """The files of a raw path: of a folder its records, or its text files, or its CSV and JSON files."""
    if Path(path).is_dir():
        for suffixes in (RECORD_SUFFIXES, TEXT_SUFFIXES, OTHER_SUFFIXES):
            with contextlib.suppress(DataError):
                return find_files([path], suffixes)
    elif not Path(path).exists() and not is_pattern(path):
        raise DataError(
            f"{path} does not exist, nor {path}.idx",
            hint=f"a file, folder or pattern ({', '.join(KINDS)}), or the --output of `megakd prepare`",
        )
    return find_files([path])


def choose_format(data: Data, files: Sequence[Path]) -> SampleFormat:
    """The config's format, found out from the first record if it is `auto`."""
    name = detect(files, data.columns) if data.format == "auto" else data.format
    return SampleFormat(
        name, data.template, data.columns, read_chat_template(data.chat_template),
        data.chat_template_kwargs, ChatTokens(**data.chat_tokens.model_dump()), data.answer_only_loss, data.add_bos,
        data.add_eos, data.strict, data.truncation, data.truncation_field,
        None if data.truncation == "end" else data.sequence_length + 1,
    )  # fmt: skip


def _without_use(data: Data, name: str) -> list[str]:
    """Keys that are given, and that a format has no use for."""
    users = {"template": TEMPLATED, "chat_tokens": ("nemo_chat",), "chat_template": ("messages",),
             "chat_template_kwargs": ("messages",)}  # fmt: skip
    defaults = type(data)(train="-", sequence_length=1)
    return [
        f"data.{key}"
        for key, formats in users.items()
        if name not in formats and getattr(data, key) != getattr(defaults, key)
    ]


def read_chat_template(value: str | None) -> str | None:
    """A template given as such (it holds braces) or as a file's name."""
    if value is None or "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: {value} cannot be read: {error}", hint="a Jinja file") from error


def _key(
    files: Sequence[Path], remembered: Path, tokenizer: Tokenizer, sample_format: SampleFormat, on_error: str
) -> str:
    """Hash of everything the tokens depend on; digests of unchanged files are remembered."""
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(remembered.read_text())
    digests = {}
    for file in files:
        stat = file.stat()
        seen = known.get(str(file.absolute()))
        same = seen and seen[:2] == [stat.st_size, stat.st_mtime_ns]
        digests[str(file.absolute())] = seen if same else [stat.st_size, stat.st_mtime_ns, file_digest(file)]
    if known | digests != known:
        with contextlib.suppress(OSError):  # a folder that cannot be written to: read the data again next time
            publish_text(remembered, json.dumps(known | digests, indent=1))
    parts = {
        "encoding": _ENCODING,
        "data": [[kind_of(file), digests[str(file.absolute())][2]] for file in files],
        "tokenizer": [tokenizer.fingerprint, *map(file_digest, tokenizer.files)],
        "special ids": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id],
        "format": sample_format.relevant(tokenizer),
        "on_error": on_error,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def file_digest(file: Path) -> str:
    """BLAKE2b of 128 bits of a file, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path):
    """Make a folder and hold the lock in it, until the process ends at the latest; a finished index needs neither."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owning(folder / "lock", wait=True))
        yield
