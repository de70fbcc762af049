"""Hidden states as bytes: as they are, in bfloat16, or in 8 bits with a scale for every 64 channels.

`q8`: of the G = ceil(H / 64) groups of channels of a token, each has the scale s = (largest |h|) / 127, rounded up to
bfloat16 (by less than 1 %), and its channels are round(h / s), one signed byte each. A channel is off by s / 2 at most,
so a logit by e = sum over the groups of s / 2 * (the sum of |w| of its row there), and KL(exact || stored) <= e^2 / 2
at temperature 1, with e the largest of them.

    bf16, fp32   [T, H]
    q8           scales [T, G] bfloat16, then [T, H] int8

Sizes: T tokens, H channels, G groups of them.
"""

import numpy as np
import torch
from torch import Tensor

CODECS = {"bf16": torch.bfloat16, "fp32": torch.float32}  # and q8
GROUP = 64


def groups_of(hidden_size: int) -> int:
    return -(-hidden_size // GROUP)


def hidden_bytes(codec: str, tokens: int, hidden_size: int) -> int:
    """Bytes of so many tokens."""
    if codec == "q8":
        return tokens * (2 * groups_of(hidden_size) + hidden_size)
    return tokens * hidden_size * CODECS[codec].itemsize


def encode_hidden(hidden_TH: Tensor, codec: str) -> bytes:
    """The bytes of hidden states of any floating type on a CPU; raises ValueError unless all are finite."""
    if not hidden_TH.isfinite().all():
        raise ValueError("hidden states that are NaN or infinite cannot be stored")
    if codec != "q8":
        return raw_bytes(hidden_TH.to(CODECS[codec]))
    tokens, size = hidden_TH.shape
    padded_TGC = np.zeros((tokens, groups_of(size) * GROUP), np.float32)
    padded_TGC[:, :size] = hidden_TH.float().numpy()
    padded_TGC = padded_TGC.reshape(tokens, -1, GROUP)
    bits_TG = (np.abs(padded_TGC).max(2, initial=0) / np.float32(127)).view(np.uint32)
    bits_TG = (bits_TG + np.uint32(0xFFFF)) >> 16 << 16  # bfloat16, rounded up
    scale_TG = bits_TG.view(np.float32)
    steps_TGC = np.divide(padded_TGC, scale_TG[..., None], out=np.zeros_like(padded_TGC), where=scale_TG[..., None] > 0)
    steps_TH = np.rint(steps_TGC).astype(np.int8).reshape(tokens, -1)[:, :size]
    return (bits_TG >> 16).astype("<u2").tobytes() + steps_TH.tobytes()


def decode_hidden(content, codec: str, tokens: int, hidden_size: int) -> Tensor:
    """[T, H] on the CPU: bfloat16 of codec bf16, else float32. `content` has `hidden_bytes`."""
    if codec != "q8":
        return from_bytes(content, CODECS[codec]).view(tokens, hidden_size)
    groups = groups_of(hidden_size)
    bits_TG = np.frombuffer(content, "<u2", tokens * groups).astype(np.uint32) << 16
    steps_TH = np.frombuffer(content, np.int8, offset=2 * tokens * groups).reshape(tokens, hidden_size)
    scale_TH = np.repeat(bits_TG.view(np.float32).reshape(tokens, groups), GROUP, axis=1)[:, :hidden_size]
    return torch.from_numpy(steps_TH * scale_TH)


def raw_bytes(x: Tensor) -> bytes:
    """The numbers of a tensor on the CPU, little-endian, one after the other."""
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def from_bytes(content, dtype: torch.dtype) -> Tensor:
    """Numbers that `raw_bytes` wrote, [N]; a copy, but of a bytearray, which it keeps."""
    if not len(content):
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(content if isinstance(content, bytearray) else bytearray(content), dtype=dtype)
