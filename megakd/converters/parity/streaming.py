"""Models whose weights are in memory only while they are used: built without any, filled module by module."""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.nn import Module, Parameter


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without data (buffers have theirs), one at a time, so nothing adds up."""
    register = Module.register_parameter

    def register_on_meta(self, name: str, parameter: Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            attributes = parameter.__dict__
            parameter = Parameter(parameter.detach().to("meta"), requires_grad=False)
            parameter.__dict__.update(attributes)
        register(self, name, parameter)

    Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        Module.register_parameter = register


def put(model: Module, name: str, tensor: Tensor) -> None:
    """Give the parameter or buffer of this dotted name its data.

    Raises:
        ValueError: the shapes differ.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    known = module._parameters.get(leaf)
    if known is None:
        known = module._buffers[leaf]
    if known.shape != tensor.shape:
        raise ValueError(f"{name} is {list(known.shape)} in the model, {list(tensor.shape)} in the checkpoint")
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    parameter = Parameter(tensor, requires_grad=False)
    parameter.__dict__.update(known.__dict__)
    module._parameters[leaf] = parameter


def take_away(module: Module) -> None:
    """Drop the data of all parameters below a module."""
    for inner in module.modules():
        for leaf, parameter in inner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = Parameter(parameter.detach().to("meta"), requires_grad=False)
                empty.__dict__.update(parameter.__dict__)
                inner._parameters[leaf] = empty
