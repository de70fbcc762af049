"""Logits with everything that a kernel may meet, and how far off its results may be."""

import itertools
import os

import pytest
import torch

from megakd.kernels.triton import tiles as triton_tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# NaN and infinity in the logits are part of the cases; numpy, which the interpreter computes with, remarks on them.
REMARKS = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic:UserWarning")

TILE = triton_tiles.TILE.value
WIDTHS = [1, 101, 127, 128, 129, 4099]
ALIGNED = "aligned"  # padding to a multiple of 16 columns: neighbours are loaded together, as in every real model
# One rounding to the output's dtype. The interpreter cuts the last bits off instead of rounding, when it stores bf16.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}  # below it there is nothing to round to


def case(width, top_k, dtype, padding):
    """Logits [7, W + padding], columns [7, K], label columns [7], supervised [7]; row by row: plain, masked and full of
    NaN, three levels, -inf here and there, 1e4 apart, all equal, one 250 above the rest."""
    aligned = padding == ALIGNED
    padding = -width % 16 or 16 if aligned else padding
    neighbours = triton_tiles.lane_shape(torch.empty(7, width + padding, dtype=dtype))["E"]
    assert neighbours == (16 // dtype.itemsize if aligned else 1)
    generator = torch.Generator().manual_seed(width * 1000 + top_k)
    x = 3 * torch.randn(7, width + padding, generator=generator)
    x[1] = torch.nan
    x[2] = (x[2] / 3).round().clamp(-1, 1)
    x[3, torch.rand(width + padding, generator=generator) < 0.3] = -torch.inf
    x[4] = (x[4] > 0) * 2e4 - 1e4
    x[5] = 0.25
    x[6, width // 2] = 250.0
    x[:, width:] = torch.nan
    columns = torch.stack([torch.randperm(width, generator=generator)[:top_k] for _ in range(7)])
    columns[torch.rand(7, top_k, generator=generator) < 0.2] = -1
    columns[0, 0] = width - 1
    columns[0, 1:][columns[0, 1:] == width - 1] = -1
    if width > TILE:  # the last column of a tile and the first of the next
        columns[5][(columns[5] == TILE - 1) | (columns[5] == TILE)] = -1
        columns[5, -2:] = torch.tensor([TILE - 1, TILE])[-top_k:]
    labels = torch.randint(0, width, (7,), generator=generator)
    labels[0], labels[2] = -1, columns[2, 0]
    supervised = torch.arange(7) != 1
    return (part.to(DEVICE) for part in (x.to(dtype), columns, labels, supervised))


KINDS = [(1.0, torch.bfloat16), (2.0, torch.float32), (2.0, torch.bfloat16), (1.0, torch.float32), (2.0, torch.float16)]


def case_list():
    """(width, padding, K, temperature, dtype, programs).

    The widest, which has two tiles, meets every kind with and without neighbours, in one program and in two by turns.
    The narrow ones differ by a lane more or less: each of them meets every K; kinds and padding by turns.
    """
    turn = itertools.count()
    for width in WIDTHS:
        for top_k in dict.fromkeys(k for k in (1, 8, 100, width) if k <= min(width, 1024)):
            paddings = (3, ALIGNED) if width in (1, 4099) else ((3, ALIGNED)[next(turn) % 2],)
            for padding in paddings:
                wide = (width, top_k) == (4099, 8)
                for temperature, dtype in KINDS if wide else [KINDS[next(turn) % len(KINDS)]]:
                    yield width, padding, top_k, temperature, dtype, (1, 8192)[next(turn) % 2] if wide else 8192


def teacher(width, top_k, dtype, padding=3):
    """Logits [6, W + padding]: plain, many ties, crowded at the top, all equal, 1e4 apart, all negative."""
    x = 3 * torch.randn(6, width + padding, generator=torch.Generator().manual_seed(width + top_k))
    x[1] = (2 * x[1]).round() / 2
    x[2] = x[2].round().clamp(max=3)
    x[3] = -7.0
    x[4] *= 3e3
    x[5] = -x[5].abs() - 1
    x[:, width:] = torch.nan
    return x.to(dtype).to(DEVICE)


def case_name(value):
    return str(value).removeprefix("torch.")


def assert_near(got, want, relative, absolute):
    """Within float32 arithmetic (exp of a large gap is off by more) and a rounding; per row."""
    got, want = got.double(), want.double()
    largest = want.abs().amax(1, keepdim=True)
    wrong = ~((got - want).abs() <= (relative + 3e-6) * want.abs() + absolute + 2e-7 * largest)
    assert not wrong.any(), (wrong.nonzero()[:5], got[wrong][:5], want[wrong][:5])
