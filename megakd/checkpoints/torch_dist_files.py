"""Megatron's torch_dist folders, written tensor by tensor, in one process and without Megatron.

The format is torch.distributed.checkpoint's: `.metadata` (a pickled description: tensors, their chunks, and where
each chunk's bytes are) beside data files in which every chunk is what torch.save writes. Megatron adds
`metadata.json`, which names the format, and `common.pt`, the plain values.
"""

import json
import pathlib
import pickle

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megakd.checkpoints.layout import Place
from megakd.digests import DigestingFile, FileDigests
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
    Attributes:
        written: digests of the data files by name, once they are closed.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.entries, self.storage = {}, {}
        self.file, self.files = None, 0
        self.written: dict[str, FileDigests] = {}

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
            self._close()
            self.file = DigestingFile(self.folder / f"__0_{self.files}.distcp")
            self.files += 1
        start = self.file.tell()
        save(self.file)
        self.storage[index] = _StorageInfo(self.file.path.name, start, self.file.tell() - start)

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.written[self.file.path.name] = self.file.digester.digests()
            self.file = None

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self._close()

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
