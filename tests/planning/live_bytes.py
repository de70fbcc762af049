"""Bytes of the tensors that are alive, at the worst moment: what a device's allocator would have been asked for."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts every storage that an operation returns, until it dies.

    What an operation allocates for itself and frees before it returns is not seen, nor that a storage is emptied while
    it lives, as FSDP does.

    Attributes:
        now, peak: bytes.
        at_peak: (bytes, shape, dtype) of what was alive at the peak.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, tuple] = {}
        self.at_peak: list[tuple] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tree_map_only(torch.Tensor, self.see, result)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self.alive.values())
        return result

    def see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = (storage.nbytes(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self.now += storage.nbytes()
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)[0]
