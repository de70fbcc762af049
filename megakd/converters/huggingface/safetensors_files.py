"""safetensors files, read and written tensor by tensor at their place, so that no more than one is ever in memory.

A file is 8 bytes with the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), and the data.
"""

import json
import math
import os
import pathlib

import torch
from torch import Tensor

from megakd.errors import CheckpointError
from megakd.limits import check_limit, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsReader:
    """One file.

    Attributes:
        header: the header's text, verbatim.
        entries: name -> {"dtype", "shape", "data_offsets"}, in the header's order.

    Raises:
        CheckpointError: the file is missing, truncated, or not what it says.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= size - 8:
                    raise ValueError(f"{size} bytes with a header of {length}")
                check_limit("HEADER_BYTES", length, path, CheckpointError)
                self.header = file.read(length).decode("utf-8")
            self.start = 8 + length
            self.entries = described(parse_json(self.header, path, CheckpointError))
            ends = [entry["data_offsets"][1] for entry in self.entries.values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is no safetensors file: {error}", hint="it is missing or truncated; copy it again"
            ) from error
        if self.start + max(ends, default=0) != size:
            raise CheckpointError(
                f"{path} is {size} bytes long, its header describes {self.start + max(ends, default=0)}",
                hint="the file is truncated; copy it again",
            )

    def spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        entry = self.entries[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has the type {entry['dtype']}, which cannot be converted")
        return torch.Size(entry["shape"]), DTYPES[entry["dtype"]]

    def load(self, name: str) -> Tensor:
        shape, dtype = self.spec(name)
        low, high = self.entries[name]["data_offsets"]
        data = torch.empty(high - low, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + low)
            view, done = memoryview(data.numpy()), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path} ends inside {name}", hint="it was truncated while it was read")
                done += count
        return data.view(dtype).view(shape)


def described(header: dict) -> dict[str, dict]:
    """The tensors of a header, whose shapes and places have been checked.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: a place is negative, or has not the size of its shape.
    """
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        (low, high), shape = entry["data_offsets"], entry["shape"]
        if not all(type(number) is int and number >= 0 for number in (low, high, *shape)):
            raise ValueError(f"{name} has the shape {str(shape)[:100]} at {low} to {high}")
        dtype = DTYPES.get(entry["dtype"])
        if high < low or (dtype is not None and math.prod(shape) * dtype.itemsize != high - low):
            raise ValueError(f"{name} is {str(shape)[:100]} {entry['dtype']}, in {high - low} bytes")
    return entries


class SafetensorsWriter:
    """One file whose header is written first and whose tensors may then come in any order.

    Args:
        path: is created.
        specs: name -> (shape, dtype).
        header: a header to write verbatim; it must describe exactly `specs`. None makes one, in the order of names.
    """

    def __init__(self, path: pathlib.Path, specs: dict[str, tuple[torch.Size, torch.dtype]], header: str | None = None):
        self.path = path
        header = make_header(specs) if header is None else header
        self.entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        self.missing = set(self.entries)
        data = header.encode("utf-8")
        self.start = 8 + len(data)
        self.file = open(path, "wb")  # noqa: SIM115 closed in __exit__
        self.file.write(len(data).to_bytes(8, "little") + data)
        self.file.truncate(self.start + max((e["data_offsets"][1] for e in self.entries.values()), default=0))

    def write(self, name: str, tensor: Tensor) -> None:
        entry = self.entries[name]
        made = [NAMES[tensor.dtype], list(tensor.shape)]
        assert made == [entry["dtype"], entry["shape"]], f"{name} is {made}, the header has {entry}"
        self.file.seek(self.start + entry["data_offsets"][0])
        self.file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.missing.remove(name)

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.file.close()

    def finish(self) -> None:
        assert not self.missing, f"{self.path}: never written: {sorted(self.missing)[:10]}"
        self.file.flush()
        os.fsync(self.file.fileno())


def make_header(specs: dict[str, tuple[torch.Size, torch.dtype]]) -> str:
    """A header as transformers has it: compact, with {"format": "pt"}, padded with spaces to a multiple of 8 bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(specs, key=lambda n: (-specs[n][1].itemsize, n)):
        shape, dtype = specs[name]
        size = shape.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode("utf-8")) % 8)
