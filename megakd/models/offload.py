"""Frozen weights that rest in host memory, and are on the device while their model runs."""

import torch
from torch.nn import Parameter

from megakd.models.gpt import GPT


class Offload:
    """The weights of a model that only runs forward; a `with` block brings them to the device, and lets them go.

    They are copied in the order in which they are needed, on a stream of their own: a layer waits for its own weights
    alone, and the copies of later ones hide behind it. Nothing is copied back. Outside of the block a weight is an
    empty tensor; whoever needs a shape asks the architecture.

    Args:
        gpt: with weights, on its device; they leave it here.
    Attributes:
        host: copies by parameter, in pinned memory on CUDA, in the order of use.
    """

    def __init__(self, gpt: GPT):
        layers = [layer for chunk in gpt.chunks for layer in chunk.decoder.layers]
        of_layers = [list(layer.parameters()) for layer in layers]
        known = {parameter for unit in of_layers for parameter in unit}
        rest = list(dict.fromkeys(p for chunk in gpt.chunks for p in chunk.parameters() if p not in known))
        self.units: list[list[Parameter]] = [rest, *of_layers]
        self.host = {parameter: on_host(parameter) for unit in self.units for parameter in unit}
        self.device = next(gpt.parameters()).device
        self.stream, self.arrived = torch.cuda.Stream(), []
        for number, module in [(0, chunk) for chunk in gpt.chunks] + list(enumerate(layers, start=1)):
            module.register_forward_pre_hook(lambda module, arguments, number=number: self.wait(number))
        self.release()

    def __enter__(self) -> "Offload":
        self.fetch()
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def fetch_rest(self) -> None:
        """Embedding, last norm and head alone, for whoever runs the head when the model has run; they stay until
        `release`."""
        self.fetch(1)
        self.wait(0)

    def fetch(self, count: int | None = None) -> None:
        """Start the copies of the first units, of all by default, that are not there."""
        units = self.units[len(self.arrived) : count]
        for parameter in (parameter for unit in units for parameter in unit):
            # Memory of the stream that will use and free it.
            parameter.data = torch.empty_like(self.host[parameter], device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        for unit in units:
            with torch.cuda.stream(self.stream):
                for parameter in unit:
                    parameter.data.copy_(self.host[parameter], non_blocking=True)
            self.arrived.append(self.stream.record_event())

    def wait(self, number: int) -> None:
        """Before a unit runs: what follows on the current stream comes after its copies."""
        assert self.arrived, "the model runs while its weights are in host memory"
        torch.cuda.current_stream().wait_event(self.arrived[number])

    def release(self) -> None:
        """Free the weights, once what has been started with them is done."""
        torch.cuda.current_stream().wait_stream(self.stream)
        for parameter in self.host:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        self.arrived.clear()


def on_host(parameter: Parameter) -> torch.Tensor:
    """A copy in host memory; pinned where it is to be copied to a GPU, so that this needs no one to wait."""
    weight = parameter.detach()
    return weight.cpu().pin_memory() if weight.is_cuda else weight.clone()
