"""Rotary frequencies: what a model section's rope_scaling makes of them."""

import math

import torch
from torch import Tensor

from megakd.config import Model, RopeScaling


def inverse_frequencies(model: Model) -> Tensor:
    """Angle per position of each rotated pair of channels, stretched as the model says.

    Returns:
        float32 [rotated channels / 2], radians per token; the first pair turns fastest.
    Source: linear is position interpolation (arXiv:2306.15595); llama3 leaves wavelengths below
        original_length / high_freq_factor alone, divides those above original_length / low_freq_factor, and goes
        from one to the other linearly in original_length / wavelength.
    """
    channels = int(model.head_channels * model.rotary_percent)
    frequencies = 1.0 / (model.rotary_base ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels))
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_length * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
