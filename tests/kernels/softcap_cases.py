"""The soft cap against float64, in the implementation that is chosen here: run by test_softcap.py.

Under TRITON_INTERPRET=1 (set before Triton is first imported) that is Triton's, without it on a CPU PyTorch's.
"""

import os

import pytest
import torch
from torch.testing import assert_close

from megakd.kernels.paths import softcap_passes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# One rounding to the result's dtype. The interpreter cuts the last bits off instead of rounding, when it stores bf16.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}


def raw_logits(width, dtype, padding):
    """[7, width] of a wider matrix: plain, minute, saturating, +-1e4, infinite, zero, around where tanh is a series."""
    generator = torch.Generator().manual_seed(width)
    raw = 3 * torch.randn(7, width + padding, generator=generator)
    raw[1] *= 1e-4
    raw[2] *= 30
    raw[3] = torch.where(raw[3] > 0, 1e4, -1e4)
    raw[4, ::2] = torch.where(raw[4, ::2] > 0, torch.inf, -torch.inf)
    raw[5] = 0
    raw[6] = torch.linspace(0.05, 0.15, width + padding) * 5.0
    return raw.to(dtype).to(DEVICE)[:, :width]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("softcap", [30.0, 5.0, 0.3])
def test_cap_and_its_derivative(dtype, softcap):
    for width, padding in ((1, 0), (101, 3), (4099, 1)):
        raw_TW = raw_logits(width, dtype, padding)
        assert softcap_passes(raw_TW).__name__ == f"megakd.kernels{'.triton' * (INTERPRETED or raw_TW.is_cuda)}.softcap"
        passes, u_TW = softcap_passes(raw_TW), raw_TW.double() / softcap
        out_TW = torch.full_like(raw_TW, torch.nan)
        passes.cap(raw_TW, softcap, out_TW)
        smallest = 2.0**-24 if dtype == torch.float16 else 1e-37
        rounding = ROUNDING[dtype] + 1e-6
        assert_close(out_TW.double(), softcap * u_TW.tanh(), rtol=rounding, atol=smallest)
        grad_TW = torch.randn(raw_TW.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
        want_TW = grad_TW.double() / u_TW.cosh().square()
        passes.uncap(raw_TW, softcap, grad_TW)
        assert_close(grad_TW.double(), want_TW, rtol=rounding + 1e-6 * float(u_TW[:3].abs().max()), atol=smallest)
        again_TW = raw_TW.clone()
        passes.cap(again_TW, softcap, again_TW)  # in place
        assert torch.equal(again_TW, out_TW)
    passes.cap(raw_TW[:0], softcap, out_TW[:0])
    passes.uncap(raw_TW[:0], softcap, out_TW[:0])
