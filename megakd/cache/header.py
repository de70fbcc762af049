"""`cache.json`: what a cache was recorded for, what its rows hold, and its shards with their digests."""

import dataclasses
import hashlib
import json
import pathlib
import typing
from collections.abc import Iterable

from megakd import __version__
from megakd.cache.publish import publishing
from megakd.cache.row import Contents
from megakd.errors import CacheError

HEADER_FILE = "cache.json"
FORMAT = "megakd logit cache"
ENTRIES_VERSION, HIDDEN_VERSION = 1, 2  # a cache of entries is what it has always been; hidden states came with 2


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """A shard file as the header knows it.

    Attributes:
        file: name inside the folder.
        part: place of its samples in the order of recording.
        rows, tokens, entries: samples, supervised positions, and entries of all of them.
        bytes: of the file.
        head_bytes, foot_bytes: of the file before and after the rows' payloads: Arrow's metadata and all small columns.
        head_digest: of these two together; compared before Arrow reads the file.
        file_digest: of the whole file.
    """

    file: str
    part: int
    rows: int
    tokens: int
    entries: int
    bytes: int
    head_bytes: int
    foot_bytes: int
    head_digest: str
    file_digest: str


@dataclasses.dataclass(frozen=True)
class IndexRecord:
    """The key index as the header knows it."""

    rows: int
    digest: str


@dataclasses.dataclass(frozen=True)
class HeadRecord:
    """The teacher's output layer, which a cache of hidden states holds once: `cache.head`.

    Attributes:
        file: name inside the folder.
        bytes: of the file.
        chunks: digests of its chunks of 4 MiB in a row (`megakd.digests`), so that a rank checks what it reads.
        dtype: of the weight: bf16 or fp32, little-endian, [rows, hidden_size].
        rows, hidden_size: the real vocabulary, without padding; channels.
        softcap: c of logits that are c * tanh(product / c); None: they are the product.
        teacher_fingerprint: of the teacher's weight files.
    """

    file: str
    bytes: int
    chunks: str
    dtype: str
    rows: int
    hidden_size: int
    softcap: float | None
    teacher_fingerprint: str


@dataclasses.dataclass(frozen=True)
class Header:
    """All of `cache.json`.

    Attributes:
        contents: what every row holds.
        mode: how entries were chosen: top_k, top_p, sampled, hybrid or imported; or hidden, without entries.
        options: the mode's own numbers (`top_p`, `draws`, `head`, `keep_label`), and the precision the teacher ran in.
        tail: "measured" (summed directly), "derived" (1 minus the entries, of imported logits) or "none" (drawn
            entries stand for the whole vocabulary, hidden states give all of it).
        tokenizer_fingerprint: of the tokenizer of the ids.
        teacher_fingerprint: of the teacher's weight files; "" for an imported cache.
        data: what was recorded, for messages and for refusing another recording into the same folder.
        parts: number of parts the recording consists of.
        created: command, megakd version.
        finished: all parts are there, and the index.
        shards, index, head: as published; head: of hidden states only.
    """

    contents: Contents
    mode: str
    options: dict
    tail: str
    tokenizer_fingerprint: str
    teacher_fingerprint: str
    data: dict
    parts: int
    created: dict
    finished: bool = False
    shards: tuple[ShardRecord, ...] = ()
    index: IndexRecord | None = None
    head: HeadRecord | None = None

    def identity(self) -> dict:
        """What two recordings must share to be one, as flat names and values."""
        flat = dataclasses.asdict(self)
        for name in ("created", "finished", "shards", "index", "head"):
            del flat[name]
        for name in ("contents", "options", "data"):
            flat |= {f"{name}.{key}": value for key, value in flat.pop(name).items()}
        return json.loads(json.dumps(flat))

    def recordings(self) -> list[dict]:
        """`data` of every recording that was merged into this cache; of this one alone where nothing was."""
        found, waiting = [], [self.data]
        while waiting:
            data = waiting.pop(0)
            if "merged" in data:
                waiting += data["merged"]
            else:
                found.append(data)
        return found

    @property
    def tokens(self) -> int:
        """Supervised positions of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def rows(self) -> int:
        """Samples of all shards."""
        return sum(shard.rows for shard in self.shards)


def digest_of(pieces: Iterable) -> str:
    """BLAKE2b, 128 bits, of buffers one after the other, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def write_header(folder, header: Header) -> None:
    """Publish `cache.json` by rename; the last field is the digest of the others."""
    record = {"format": FORMAT, "format_version": HIDDEN_VERSION} | dataclasses.asdict(header)
    if not header.contents.hidden_size:  # as those read it who know of nothing else
        record["format_version"] = ENTRIES_VERSION
        record["contents"] = {name: value for name, value in record["contents"].items() if name != "hidden_size"}
        del record["head"]
    record["digest"] = digest_of([_canonical(record)])
    write_json(pathlib.Path(folder) / HEADER_FILE, record)


def read_header(folder) -> Header:
    """Read and check `cache.json`.

    Raises:
        CacheError: it is missing, damaged, or of a newer format.
    """
    path = pathlib.Path(folder) / HEADER_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        version = record["format_version"]
    except FileNotFoundError as error:
        raise CacheError(
            f"{folder} is no logit cache: it has no {HEADER_FILE}",
            hint="record one with `megakd cache CONFIG.yaml`, or correct teacher.cache",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if version not in (ENTRIES_VERSION, HIDDEN_VERSION):
        created = record.get("created")
        writer = created.get("megakd_version", "unknown") if isinstance(created, dict) else "unknown"
        raise CacheError(
            f"{path} has cache format {version}, this megakd ({__version__}) reads up to {HIDDEN_VERSION}",
            hint=f"use the megakd that wrote it ({writer}) or a later one",
        )
    seen = record.pop("digest", None)
    if seen != digest_of([_canonical(record)]):
        raise _unreadable(path, ValueError(f"its digest is {seen}, its content has {digest_of([_canonical(record)])}"))
    del record["format"], record["format_version"]
    return load_record(Header, record, path)


def load_record(kind, record: dict, path):
    """A dataclass, and those inside of it, from what `dataclasses.asdict` and JSON made of it."""
    try:
        hints = typing.get_type_hints(kind)
        values = {name: _revive(hints[name], value, path) for name, value in record.items()}
        return kind(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _revive(hint, value, path):
    if dataclasses.is_dataclass(hint):
        return load_record(hint, value, path)
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple(_revive(inner[0], item, path) for item in value)
    if inner and dataclasses.is_dataclass(inner[0]):
        return None if value is None else load_record(inner[0], value, path)
    return value


def write_json(path: pathlib.Path, record: dict) -> None:
    """Publish a JSON file."""
    with publishing(path) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _canonical(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def _unreadable(path, error: Exception) -> CacheError:
    return CacheError(
        f"{path} cannot be read: {type(error).__name__}: {error}",
        hint="the file was edited or damaged; copy it again, or record the cache again",
    )
