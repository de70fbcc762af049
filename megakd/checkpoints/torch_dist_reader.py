"""Megatron's torch_dist folders, read by tensor or by slice, by anyone and at any layout: runs, exports, the gate.

Nothing of the folder is believed: what its description says of shapes, places and files is checked against the files
before memory is taken, and no pickle in it can run code (megakd.checkpoints.pickles).
"""

import dataclasses
import math
import pathlib

import torch
from torch import Tensor

from megakd.checkpoints.inside import plain_name
from megakd.checkpoints.layout import Place
from megakd.checkpoints.metadata_pickle import Inert, load_metadata
from megakd.checkpoints.pickles import load_window
from megakd.checkpoints.record import Files, damaged
from megakd.digests import DamagedFile, VerifiedFile
from megakd.errors import CheckpointError

DESCRIPTION = ".metadata"
KEPT_FILES = 4


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of a tensor, or an object, and the bytes of a file that hold it.

    Attributes:
        offsets, sizes: the box in its tensor; empty for an object.
        file: name in the folder.
        start, length: in bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor as the folder describes it.

    Attributes:
        chunks: by their offsets; together as large as the tensor.
    """

    size: torch.Size
    dtype: torch.dtype
    chunks: dict[tuple[int, ...], Chunk]


class TorchDistReader:
    """Reads tensors, whole or by slice, and objects.

    Args:
        files: opens the folder's files, comparing them with what was saved; None: nothing is compared.
    Attributes:
        tensors: key -> Entry.
        objects: key -> Chunk.

    Raises:
        CheckpointError: the description is missing, damaged, names a class that it should not, or does not fit the
            files.
    """

    def __init__(self, folder: pathlib.Path, files: Files | None = None):
        self.folder, self.files = folder, files or Files(folder, {}, None)
        self._kept: dict[str, VerifiedFile] = {}
        where = folder / DESCRIPTION
        with self._opened(DESCRIPTION) as file:
            description = load_metadata(file, where)
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        try:
            places = _places(description, where, sizes)
            entries = _state(description)["state_dict_metadata"].items()
            self.tensors = {key: _entry(key, value, places) for key, value in entries if "size" in _state(value)}
            self.objects = {key: places[key, None] for key, value in entries if "size" not in _state(value)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where} does not describe this folder: {type(error).__name__}: {str(error)[:300]}",
                hint="files are truncated, or of different checkpoints; copy the folder again",
            ) from error

    def read(self, place: Place, rows: int | None = None) -> Tensor:
        """One tensor; of a stacked one, the layer that `place` names.

        Args:
            rows: keep only this many leading rows of the tensor's own first axis.
        Raises:
            CheckpointError: it is not there, or cannot be read.
        """
        own = list(self.entry(place.key).size[len(place.index) :])
        if rows is not None:
            own[0] = min(rows, own[0])
        return self.read_slice(place.key, [*place.index, *[0] * len(own)], [*[1] * len(place.index), *own]).view(own)

    def entry(self, key: str) -> Entry:
        if key not in self.tensors:
            raise CheckpointError(
                f"{self.folder} holds no tensor {key}", hint="is it the model that its record describes?"
            )
        return self.tensors[key]

    def read_slice(self, key: str, low: list[int], sizes: list[int]) -> Tensor:
        """The box of these sizes whose first element is at `low`, contiguous."""
        entry = self.entry(key)
        high = [a + size for a, size in zip(low, sizes, strict=True)]
        if any(b > size for b, size in zip(high, entry.size, strict=True)):
            raise CheckpointError(
                f"{self.folder}: {key} is {list(entry.size)}, wanted are {low} to {high}",
                hint="is it the model that its record describes?",
            )
        exact = entry.chunks.get(tuple(low))
        if exact is not None and list(exact.sizes) == sizes:
            return self._chunk(key, entry, exact).contiguous()
        whole, filled = torch.empty(sizes, dtype=entry.dtype), 0
        for chunk in entry.chunks.values():
            start = [max(a, b) for a, b in zip(low, chunk.offsets, strict=True)]
            stop = [min(a, b + size) for a, b, size in zip(high, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(start, stop, strict=True)):
                part = self._chunk(key, entry, chunk)[_slices(start, stop, chunk.offsets)]
                whole[_slices(start, stop, low)] = part
                filled += part.numel()
        if filled != whole.numel():
            raise CheckpointError(
                f"{self.folder}: {filled} of {whole.numel()} values of {key} are there",
                hint="the checkpoint was put together from several; copy it again",
            )
        return whole

    def read_object(self, key: str):
        """What was saved as an object under this key.

        Raises:
            CheckpointError: it is not there, cannot be read, or names a class that no checkpoint needs.
        """
        if key not in self.objects:
            raise CheckpointError(
                f"{self.folder} holds no object {key}", hint="was it saved by a run with the same settings?"
            )
        chunk = self.objects[key]
        return self._load(key, chunk)

    def _opened(self, name: str) -> VerifiedFile:
        try:
            return self.files.open(name)
        except DamagedFile as error:
            raise damaged(error) from error
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / name} cannot be read: {error}",
                hint="the folder is no torch_dist checkpoint, or it is damaged; copy it again",
            ) from error

    def _load(self, key: str, chunk: Chunk):
        """What lies at a place. The files last read from stay open: what they keep of a chunk serves its next part."""
        file = self._kept.pop(chunk.file, None) or self._opened(chunk.file)
        self._kept[chunk.file] = file
        while len(self._kept) > KEPT_FILES:
            self._kept.pop(next(iter(self._kept))).close()
        return load_window(file, chunk.start, chunk.length, f"{self.folder / chunk.file}: {key}")

    def _chunk(self, key: str, entry: Entry, chunk: Chunk) -> Tensor:
        tensor = self._load(key, chunk)
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (chunk.sizes, entry.dtype):
            seen = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"{self.folder / chunk.file}: {key} is {seen}, {DESCRIPTION} says {list(chunk.sizes)} {entry.dtype}",
                hint="files of different checkpoints were mixed; copy the folder again",
            )
        return tensor


def _state(value: Inert) -> dict:
    state = value.state
    if not isinstance(state, dict):
        raise TypeError(f"{type(value).__name__} holds {type(state).__name__}")
    return state


def _places(description: Inert, where, sizes: dict[str, int]) -> dict[tuple[str, tuple | None], Chunk]:
    """Where the bytes of each box are, by key and offsets (None: an object), inside files that are there."""
    found = {}
    for index, info in _state(description)["storage_data"].items():
        index, info = _state(index), _state(info)
        file, start, length = plain_name(info["relative_path"], where), info["offset"], info["length"]
        if file not in sizes:
            raise ValueError(f"{file} is missing")
        if not _are_counts(start, length) or start + length > sizes[file]:
            raise ValueError(f"{file} has {sizes[file]} bytes, described are {length} from {start}")
        if info.get("transform_descriptors"):
            raise ValueError(f"{file} is transformed by {str(info['transform_descriptors'])[:100]}; none is known")
        key, offsets = index["fqn"], index.get("offset")
        if not isinstance(key, str) or not (offsets is None or (isinstance(offsets, tuple) and _are_counts(*offsets))):
            raise ValueError(f"{str(key)[:100]} at {str(offsets)[:100]}")
        found[key, offsets] = Chunk(offsets or (), (), file, start, length)
    return found


def _entry(key: str, value: Inert, places: dict) -> Entry:
    state = _state(value)
    size, dtype = state["size"], _dtype(state["properties"])
    if not isinstance(size, tuple) or not _are_counts(*size):
        raise ValueError(f"{key} has the shape {str(size)[:100]}")
    chunks = {}
    for chunk in state["chunks"]:
        offsets, sizes = _state(chunk)["offsets"], _state(chunk)["sizes"]
        if not (_are_counts(*offsets, *sizes) and len(offsets) == len(sizes) == len(size)):
            raise ValueError(f"{key} has a part of {str(sizes)[:100]} at {str(offsets)[:100]}")
        place = places[key, offsets]
        if any(a + n > end for a, n, end in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a part of {key} lies outside of it")
        if math.prod(sizes) * dtype.itemsize > place.length:
            raise ValueError(f"{place.length} bytes hold no {list(sizes)} {dtype} of {key}")
        chunks[offsets] = dataclasses.replace(place, sizes=sizes)
    if sum(math.prod(chunk.sizes) for chunk in chunks.values()) != math.prod(size):
        raise ValueError(f"the parts of {key} do not make up {list(size)}")
    return Entry(torch.Size(size), dtype, chunks)


def _dtype(properties: Inert) -> torch.dtype:
    state = properties.state
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a type is {str(dtype)[:100]}")
    return dtype


def _are_counts(*values) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _slices(start, stop, origin) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, origin, strict=True))
