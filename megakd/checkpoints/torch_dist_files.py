"""Megatron's torch_dist folders without Megatron: written and read tensor by tensor, in one process, by anyone.

The format is torch.distributed.checkpoint's: `.metadata` (a pickled description: tensors, their chunks, and where
each chunk's bytes are) beside data files in which every chunk is what torch.save writes. Megatron adds
`metadata.json`, which names the format, and `common.pt`, the plain values.
"""

import io
import json
import pathlib
import pickle

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megakd.checkpoints.layout import Place
from megakd.errors import CheckpointError

FILE_BYTES = 4 << 30  # a data file is closed when it has reached this size
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWriter:
    """Writes a folder that Megatron loads at any layout; holds nothing but the tensor being written.

    Args:
        folder: exists and is empty; whole after `finish`.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.entries, self.storage = {}, {}
        self.file, self.files = None, 0

    def write(self, place: Place, tensor: Tensor) -> None:
        """Append one tensor (or one layer of a stacked tensor)."""
        offsets = torch.Size(place.index + (0,) * tensor.dim())
        size = torch.Size(place.sizes + tuple(tensor.shape))
        chunk = torch.Size((1,) * len(place.sizes) + tuple(tensor.shape))
        entry = self.entries.setdefault(
            place.key,
            dcp.TensorStorageMetadata(
                properties=dcp.TensorProperties(dtype=tensor.dtype, requires_grad=False), size=size, chunks=[]
            ),
        )
        if entry.size != size or entry.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{place.key}: layer {place.index} is {list(size)} {tensor.dtype}, the layers before it are "
                f"{list(entry.size)} {entry.properties.dtype}",
                hint="layers of one checkpoint must have one shape and one type; cast the source to one type",
            )
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets=offsets, sizes=chunk))
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage of a view
        self._append(dcp.MetadataIndex(place.key, offsets), lambda file: torch.save(tensor.view(chunk), file))

    def write_object(self, place: Place, value) -> None:
        """Append a small object, sharded over the leading axes as Megatron names it."""
        index, sizes = ("_".join(map(str, axis)) for axis in (place.index or (0,), place.sizes or (1,)))
        key = f"{place.key}/shard_{index}_{sizes}"
        self.entries[key] = dcp.BytesStorageMetadata()
        self._append(dcp.MetadataIndex(key), lambda file: torch.save(value, file))

    def _append(self, index: dcp.MetadataIndex, save) -> None:
        if self.file is None or self.file.tell() >= FILE_BYTES:
            if self.file is not None:
                self.file.close()
            self.file = open(self.folder / f"__0_{self.files}.distcp", "wb")  # noqa: SIM115 closed in __exit__
            self.files += 1
        start = self.file.tell()
        save(self.file)
        name = pathlib.Path(self.file.name).name
        self.storage[index] = _StorageInfo(name, start, self.file.tell() - start)

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        if self.file is not None:
            self.file.close()

    def finish(self, common: dict) -> None:
        """Write what describes the data; without it the folder is no checkpoint.

        Args:
            common: plain values for Megatron's common.pt.
        """
        paths = {key: (key,) for key in self.entries}
        description = dcp.Metadata(state_dict_metadata=self.entries, planner_data=paths, storage_data=self.storage)
        torch.save(common, self.folder / "common.pt")
        (self.folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
        with open(self.folder / ".metadata", "wb") as file:
            pickle.dump(description, file)


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, and refuses every class that has no business in it: a pickle can run any code."""

    ALLOWED = frozenset(
        [
            *((dcp.__name__, name) for name in dcp.__all__ if name != "STATE_DICT_TYPE"),
            (dcp.__name__, "_MEM_FORMAT_ENCODING"),
            *((planner.__name__, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
            (_StorageInfo.__module__, "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("collections", "OrderedDict"),
        ]
    )

    def find_class(self, module: str, name: str):
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


class TorchDistReader:
    """Reads tensors, whole or by slice, from a torch_dist folder written at any layout.

    Attributes:
        tensors: key -> TensorStorageMetadata (`.size`, `.properties.dtype`).

    Raises:
        CheckpointError: the description is missing, damaged, or holds something that it should not.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        try:
            with open(folder / ".metadata", "rb") as file:
                self.description = MetadataUnpickler(file).load()
            entries = self.description.state_dict_metadata
        except (OSError, EOFError, AttributeError, pickle.UnpicklingError, IndexError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{folder / '.metadata'} cannot be read: {type(error).__name__}: {error}",
                hint="the folder is no torch_dist checkpoint, or it is damaged; copy it again",
            ) from error
        self.tensors = {key: entry for key, entry in entries.items() if isinstance(entry, dcp.TensorStorageMetadata)}

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

    def entry(self, key: str) -> dcp.TensorStorageMetadata:
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
        whole = None
        for chunk in entry.chunks:
            start = [max(a, b) for a, b in zip(low, chunk.offsets, strict=True)]
            stop = [min(a, b + size) for a, b, size in zip(high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(start, stop, strict=True)):
                continue
            part = self._chunk(key, chunk)[_slices(start, stop, chunk.offsets)]
            if start == low and stop == high:
                return part.contiguous()
            if whole is None:
                whole = torch.empty(sizes, dtype=entry.properties.dtype)
            whole[_slices(start, stop, low)] = part
        return whole

    def _chunk(self, key: str, chunk: dcp.ChunkStorageMetadata) -> Tensor:
        info = self.description.storage_data[dcp.MetadataIndex(key, chunk.offsets)]
        try:
            with open(self.folder / pathlib.Path(info.relative_path).name, "rb") as file:
                file.seek(info.offset)
                return torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.folder / info.relative_path}: {key} cannot be read: {type(error).__name__}: {error}",
                hint="the checkpoint is truncated or damaged; copy it again",
            ) from error


def _slices(start, stop, origin) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, origin, strict=True))
