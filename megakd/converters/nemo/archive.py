"""`.nemo` archives: a tar of `model_config.yaml`, weights and artifacts, unpacked safely and packed again."""

import contextlib
import gzip
import hashlib
import pathlib
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator

import yaml

from megakd.checkpoints.inside import check_folder
from megakd.config.yaml12 import BoundedLoader, bounded_yaml
from megakd.errors import CheckpointError
from megakd.limits import check_limit

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights"
LARGEST_HEADER = 1 << 24  # bytes that tarfile may ask for at once: names and the like, never contents
HASHED = re.compile(r"[0-9a-f]{32}_(.+)")


def is_nemo(path: pathlib.Path) -> bool:
    """A .nemo file, or the folder that one was unpacked into."""
    return (path.is_file() and path.suffix == ".nemo") or (path / CONFIG).is_file()


@contextlib.contextmanager
def unpacked(path: pathlib.Path, scratch: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder with an archive's files; of a file, a temporary one below `scratch`.

    Raises:
        CheckpointError: it is no tar, is truncated, unpacks to more than ARCHIVE_MEMBERS or ARCHIVE_RATIO allow, or a
            member is neither file nor folder or lies outside of it.
    """
    if path.is_dir():
        check_folder(path)
        yield path
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".nemo-", dir=scratch) as folder:
        try:
            with open(path, "rb") as file, tarfile.open(fileobj=Unpacking(path, file), mode="r:") as tar:
                size = 0
                for number, member in enumerate(tar):
                    size += member.size
                    check_member(path, member)
                    check_limit("ARCHIVE_MEMBERS", number + 1, path, CheckpointError)
                    check_size(path, size)
                    tar.extract(member, folder, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise CheckpointError(
                f"{path} cannot be unpacked: {type(error).__name__}: {error}",
                hint="the archive is truncated or no .nemo file; copy it again",
            ) from error
        yield pathlib.Path(folder)


class Unpacking:
    """The bytes of a plain or gzipped archive, for tarfile, which may ask for few at once: a header's size is its own
    word, and a compressed one may be as large as it likes.
    """

    def __init__(self, path: pathlib.Path, file):
        self.path = path
        self.file = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        check_size(self.path, offset)
        return self.file.seek(offset, whence)


def check_size(path: pathlib.Path, unpacked_bytes: int) -> None:
    """Raises CheckpointError if an archive unpacks to more than weights can be compressed to."""
    ratio = -(-unpacked_bytes // max(path.stat().st_size, 1 << 16))
    check_limit("ARCHIVE_RATIO", ratio, path, CheckpointError)


def check_member(path: pathlib.Path, member: tarfile.TarInfo) -> None:
    name = pathlib.PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
        kind = "a link" if member.issym() or member.islnk() else "not inside the archive's folder, or no plain file"
        raise CheckpointError(
            f"{path}: the member {member.name!r} is {kind}",
            hint="no .nemo file has such members: it is damaged or made to do harm; nothing was unpacked from it",
        )


def read_config(folder: pathlib.Path, where: pathlib.Path) -> dict:
    """model_config.yaml, references between its keys resolved.

    Raises:
        CheckpointError: it is missing or no mapping.
    """
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        config = bounded_yaml(text, BoundedLoader, f"{where}: {CONFIG}", CheckpointError)
        if not isinstance(config, dict) or not isinstance(config.get("cfg", {}), dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{where}: {CONFIG} is missing or unreadable: {error}", hint="without its config a .nemo cannot be read"
        ) from error
    config = config.get("cfg", config)
    return {key: resolve(value, config) for key, value in config.items()}


def resolve(value, config: dict):
    """`${.key}`, `${key}` and `${model.key}` replaced by that key's value."""
    seen = 0
    while isinstance(value, str) and (match := re.fullmatch(r"\$\{(?:model)?\.*([\w.]+)\}", value)):
        inner = config
        for part in match[1].split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        value, seen = inner, seen + 1
        if seen > 10:
            raise CheckpointError(f"{CONFIG}: ${{{match[1]}}} refers to itself", hint="correct the config")
    return value


def artifact(folder: pathlib.Path, reference: str | None) -> pathlib.Path | None:
    """The file that `nemo:NAME` (or a bare name) in the config refers to, None if it is not there."""
    if not reference:
        return None
    name = pathlib.PurePosixPath(str(reference).removeprefix("nemo:")).name
    candidates = [folder / name, *sorted(folder.glob(f"*_{name}"))]
    return next((file for file in candidates if file.is_file()), None)


def plain_name(file: pathlib.Path) -> str:
    """An artifact's name without the hash that NeMo puts before it."""
    match = HASHED.fullmatch(file.name)
    return match[1] if match else file.name


def hashed_name(file: pathlib.Path) -> str:
    """The name that an artifact gets in an archive: 32 hexadecimal digits of its content, and its own name."""
    return f"{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}_{file.name}"


def pack(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Write a folder as an archive, uncompressed, with NeMo's member names (`./...`), and remove the folder."""
    with tarfile.open(target, "w:") as tar:
        tar.add(folder, arcname="./", filter=anonymous)
    shutil.rmtree(folder)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
