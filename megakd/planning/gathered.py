"""What FSDP holds whole of a model at one time, beside a rank's own part of it."""

from megakd.config import Model, Parallel, Pipeline
from megakd.planning.parameters import layer_parameters, layers_of, rank_parameters

GRADIENT_BYTES = 4  # added up in float32
PREFETCHED = 500_000_000  # elements that Megatron-FSDP gathers ahead of what runs; of gradients, twice as many wait


def gathered_weights(model: Model, parallel: Parallel, padded: int, stage: int, pipeline: Pipeline) -> int:
    """Parameters that FSDP holds whole at one time: embedding, last norm and head, a layer, and the one after it."""
    layers = [layer_parameters(model, layer, parallel).total for layer in layers_of(model, parallel, stage, pipeline)]
    ends = rank_parameters(model, parallel, padded, stage, pipeline).total - sum(layers)
    return ends + sum(sorted(layers)[-2:])


def megatron_buckets(model: Model, parallel: Parallel, padded: int, stage: int, pipeline: Pipeline, size: int) -> int:
    """Bytes that Megatron-FSDP holds whole at one time: weights, far ahead of where they run, and the gradients of what
    waits to be reduced, in float32."""
    layers = [layer_parameters(model, layer, parallel).total for layer in layers_of(model, parallel, stage, pipeline)]
    whole, largest, mean = sum(layers), max(layers), sum(layers) // len(layers)
    ends = rank_parameters(model, parallel, padded, stage, pipeline).total - whole
    weights = ends + min(whole, max(PREFETCHED, mean) + 2 * largest)
    gradients = ends + min(whole, max(2 * PREFETCHED, 2 * mean) + 2 * largest)
    return weights * size + gradients * GRADIENT_BYTES
