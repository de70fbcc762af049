"""Bytes of the tensors that are alive, at the worst moment: what a device's allocator would have been asked for."""

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts every storage that an operation returns, until it dies.

    What an operation allocates for itself and frees before it returns is not seen. That a storage is emptied and filled
    while it lives, as FSDP does, is.

    Attributes:
        now, peak: bytes.
        at_peak: (bytes, shape, dtype) of what was alive at the peak.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, tuple] = {}
        self.at_peak: list[tuple] = []

    def __enter__(self):
        torch.UntypedStorage.resize_ = lambda storage, size: self.resize(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        del torch.UntypedStorage.resize_
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tree_map_only(torch.Tensor, self.see, result)
        self.compare()
        return result

    def compare(self) -> None:
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self.alive.values())

    def resize(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """In place of its own resize_, which no dispatch sees."""
        torch._C.StorageBase.resize_(storage, size)
        known = self.alive.get(storage._cdata)
        if known is not None:
            self.now += size - known[0]
            self.alive[storage._cdata] = (size, *known[1:])
            self.compare()
        return storage

    def see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta" or isinstance(tensor, DTensor):  # the latter's own storage holds nothing
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
