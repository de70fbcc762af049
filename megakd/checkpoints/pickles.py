"""What torch.save writes, read so that nothing in it can run.

Unpickling calls whatever functions a pickle names. Here (pytorch_model.bin, a .nemo's weights, common.pt, chunks and
objects in .distcp files) every name is compared with one list first, without unpickling, and what is not on it refuses
the file; torch then loads it with its own restricted unpickler. The other pickle of a checkpoint: metadata_pickle.py.
"""

import contextlib
import io
import os
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from megakd.checkpoints.record import damaged
from megakd.digests import DamagedFile
from megakd.errors import CheckpointError
from megakd.limits import check_limit

IN_MEMORY_BYTES = 256 << 20
SAVED_NAMES = frozenset(
    [
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "UntypedStorage"),
        ("torch.nn.parameter", "Parameter"),
        ("_codecs", "encode"),  # how protocol 2 writes bytes
    ]
)
DAMAGE = (  # what a damaged file may raise on its way through pickle, zipfile and torch
    OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip


def refuse(where, module: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{where} refers to {module}.{name}, which no checkpoint needs",
        hint="a pickle that names it can run any code when it is loaded; nothing of it was: do not use this file",
    )


def load_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a whole file, mapped into memory where its format allows (torch's zip archives).

    Values that are no tensors are left out, as is what a Lightning checkpoint puts around its `state_dict`.

    Raises:
        CheckpointError: it is damaged, or names anything but tensors.
    """
    try:
        with open(path, "rb") as file:
            state = _load(file, path, mapped=path if is_zip(file) else None)
    except OSError as error:
        raise _damaged(path, error) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no tensors by name", hint="it is no model's weights, or it is damaged")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def load_values(file: io.RawIOBase, where):
    """Whatever plain values and tensors torch.save wrote into an open file.

    Args:
        where: the file's name, for errors.
    Raises:
        DamagedCheckpointError: the file does not hold what was saved.
        CheckpointError: as load_file.
    """
    with buffered(file) as reader:
        return _load(reader, where)


@contextlib.contextmanager
def buffered(file: io.RawIOBase) -> Iterator[io.BufferedReader]:
    """The file behind a buffer, which leaves it open to its caller."""
    reader = io.BufferedReader(file)
    try:
        yield reader
    finally:
        reader.detach()


def load_window(file: io.RawIOBase, start: int, length: int, where):
    """The same of a part of a file, which is read once, in its order, unless it is above IN_MEMORY_BYTES.

    Args:
        start, length: the part, in bytes.
    """
    window = Window(file, start, length)
    if length > IN_MEMORY_BYTES:
        with buffered(window) as reader:
            return _load(reader, where)
    try:
        data = window.read(length)
    except DamagedFile as error:
        raise damaged(error) from error
    except OSError as error:
        raise _damaged(where, error) from error
    return _load(io.BytesIO(data), where)


def _damaged(where, error: BaseException) -> CheckpointError:
    said = str(error).split("\n")[0]
    if "weights_only" in said or "Weights only" in said:  # torch's advice is to run what it has refused
        said = "torch's restricted unpickler refuses it"
    return CheckpointError(
        f"{where} cannot be read: {type(error).__name__}: {said[:300]}",
        hint="it is truncated or damaged, or holds more than tensors and plain values; copy it again",
    )


def _load(file: BinaryIO, where, mapped: pathlib.Path | None = None):
    try:
        check_names(file, where)
        file.seek(0)
        value = torch.load(mapped or file, map_location="cpu", mmap=mapped is not None, weights_only=True)
        _check_extents(value, where)
        return value
    except DamagedFile as error:
        raise damaged(error) from error
    except DAMAGE as error:
        raise _damaged(where, error) from error


def _check_extents(value, where) -> None:
    """A tensor may be a view that repeats its storage for ever: refuse what is larger than what was stored."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of {list(value.shape)} repeats {value.untyped_storage().nbytes()} bytes")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def is_zip(file: BinaryIO) -> bool:
    """Whether torch will read it as an archive; leaves the file at its start."""
    file.seek(0)
    first = file.read(4)
    file.seek(0)
    return first == b"PK\x03\x04"


def check_names(file: BinaryIO, where) -> None:
    """Compare every name in a file that torch.save wrote with the list, without unpickling it.

    Raises:
        CheckpointError: a name is not on it, or a pickle is above PICKLE_BYTES.
        DAMAGE: it is no such file.
    """
    if not is_zip(file):  # before torch 1.6: some pickles, one after the other, and then the bytes
        for _ in range(5):  # magic number, protocol, system, the object, the keys of its storages
            _check_pickle(file, where)
        return
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        check_limit("ARCHIVE_MEMBERS", len(members), where, CheckpointError)
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("its archive is compressed or larger inside than outside; torch.save writes it plain")
        pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        if not pickles:
            raise ValueError("its archive holds no data.pkl")
        for member in pickles:
            check_limit("PICKLE_BYTES", member.file_size, where, CheckpointError)
            _check_pickle(io.BytesIO(archive.read(member)), where)


def _check_pickle(file: BinaryIO, where) -> None:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            if not is_saved_name(module, name):
                raise refuse(where, module, name)
        elif operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"):
            raise ValueError(f"it uses the pickle operation {operation.name}, which torch.save does not write")


def is_saved_name(module: str, name: str) -> bool:
    """Whether a pickle of torch.save may name it: the list, and torch's types of elements and of storages."""
    if (module, name) in SAVED_NAMES:
        return True
    if module not in ("torch", "torch.cuda"):
        return False
    value = getattr(torch, name, None)
    return isinstance(value, torch.dtype) or (name.endswith("Storage") and name.removesuffix("Storage").isalnum())


class Window(io.RawIOBase):
    """A part of an open file as a file of its own.

    Args:
        start, length: the part, in bytes.
    """

    def __init__(self, file: io.RawIOBase, start: int, length: int):
        super().__init__()
        self.file, self.start, self.length, self.place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self.place = base + offset
        return self.place

    def readinto(self, buffer) -> int:
        wanted = memoryview(buffer)[: max(0, self.length - self.place)]
        self.file.seek(self.start + self.place)
        count = self.file.readinto(wanted)
        self.place += count
        return count
