"""Zarr arrays (version 2, uncompressed) of NeMo's older distributed checkpoints, read without the zarr library."""

import math
import pathlib

import numpy as np
import torch
from torch import Tensor

from megakd.errors import CheckpointError
from megakd.limits import read_json

DTYPES = {  # zarr's name -> how numpy reads it
    "bfloat16": "<u2", "<f2": "<f2", "<f4": "<f4", "<f8": "<f8", "<i4": "<i4", "<i8": "<i8", "|u1": "u1", "|i1": "i1",
}  # fmt: skip


def zarr_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The shape of every array in a folder.

    Raises:
        CheckpointError: as read_zarr.
    """
    return {file.parent.name: tuple(description(file.parent)["shape"]) for file in folder.glob("*/.zarray")}


def description(folder: pathlib.Path) -> dict:
    """What an array's .zarray says, which its chunks bear out.

    Raises:
        CheckpointError: it is compressed, of an unknown type, or larger than its files.
    """
    try:
        array = read_json(folder / ".zarray", CheckpointError)
        if array.get("compressor") or array.get("filters") or array.get("order", "C") != "C":
            raise ValueError("it is compressed or not in C order")
        if array["dtype"] not in DTYPES:
            raise ValueError(f"its type is {str(array['dtype'])[:100]}; known are {', '.join(DTYPES)}")
        shape, chunks = array["shape"], array["chunks"]
        if not all(type(n) is int and n > 0 for n in [*shape, *chunks]) or len(shape) != len(chunks):
            raise ValueError(f"its shape is {str(shape)[:100]} in chunks of {str(chunks)[:100]}")
        there = sum(file.stat().st_size for file in folder.iterdir() if not file.name.startswith("."))
        if (wanted := math.prod(shape) * np.dtype(DTYPES[array["dtype"]]).itemsize) > there:
            raise ValueError(f"its shape {shape} makes {wanted} bytes, its files have {there}")
        return array
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", hint="the archive is damaged; copy it") from error


def read_zarr(folder: pathlib.Path, index: tuple[int, ...]) -> Tensor:
    """One layer (or all, index ()) of an array.

    Raises:
        CheckpointError: see description; a chunk is missing or truncated.
    """
    array = description(folder)
    shape, chunks, dtype = array["shape"], array["chunks"], np.dtype(DTYPES[array["dtype"]])
    whole = np.zeros([1] * len(index) + shape[len(index) :], dtype)
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    try:
        for number in np.ndindex(*counts):
            low = [n * c for n, c in zip(number, chunks, strict=True)]
            if any(not a <= i < a + c for i, a, c in zip(index, low, chunks, strict=False)):
                continue
            data = np.fromfile(folder / ".".join(map(str, number)), dtype).reshape(chunks)
            inner = tuple(slice(i - a, i - a + 1) for i, a in zip(index, low, strict=False))
            outer = tuple(slice(a, a + c) for a, c in zip(low[len(index) :], chunks[len(index) :], strict=True))
            target = whole[(slice(None),) * len(index) + outer]
            target[...] = data[inner + tuple(slice(size) for size in target.shape[len(index) :])]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", hint="the archive is damaged; copy it") from error
    tensor = torch.from_numpy(whole.reshape(shape[len(index) :]))
    return tensor.view(torch.bfloat16) if array["dtype"] == "bfloat16" else tensor
