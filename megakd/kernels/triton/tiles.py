"""What the Triton kernels share: how programs and threads divide a matrix of logits, and sums of exponentials.

A program reads a part of one row, tile by tile. A tile is [S, N, E] columns: lane n (a thread) owns E neighbours (16
bytes, one load) in each of S segments, and the lanes lie side by side within a segment, so that loads are whole and
next to each other, and a maximum or sum over S and E stays within a thread. Lanes keep running maxima and sums of their
own, and meet once, at the end of the program: the loop over tiles has no barrier, and runs at the speed of memory.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = tl.constexpr(128)  # four warps: 8 programs and more on a multiprocessor, each waiting for memory in turn
LANE_COLUMNS = tl.constexpr(32)  # of a tile; as many as bits in the word that says which ones are entries
TILE = tl.constexpr(4096)
NONE = tl.constexpr(0x7FFFFFFF)  # a column beyond all others
INF = tl.constexpr(float("inf"))
LOG2_E = 1.4426950408889634
IN_LOG2 = tl.constexpr(LOG2_E)

PROGRAMS = (
    8192  # a grid aims at this many: several rounds of all that fit on a large GPU, so that none idles at the end
)
MOST_TILES = 8  # of a program


def on_its_device(host_function):
    """Launches on the device of the first argument (a tensor, or a tuple of them), whichever is the current one."""

    @functools.wraps(host_function)
    def guarded(first, *arguments, **options):
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return host_function(first, *arguments, **options)

    return guarded


class Grid:
    """A row is cut into `parts` of `part_columns` (whole tiles); one program for each, rows outermost."""

    def __init__(self, tokens: int, width: int):
        tiles = max(1, triton.cdiv(width, TILE.value))
        per_part = triton.cdiv(
            tiles, min(tiles, max(triton.cdiv(PROGRAMS, max(1, tokens)), triton.cdiv(tiles, MOST_TILES)))
        )
        self.parts = triton.cdiv(tiles, per_part)
        self.part_columns = per_part * TILE.value
        self.programs = (tokens * self.parts,)


def lane_shape(*tensors_TW: Tensor, multiple_of: int = 16) -> dict[str, int]:
    """S and E for these matrices, the number of warps, and no software pipelining: many programs hide the latency.

    Where rows (or what else is to be a multiple of 16) do not start at 16 bytes, there are no loads of neighbours.
    """
    starts = [start for x_TW in tensors_TW for start in (x_TW.stride(0), x_TW.data_ptr())]
    aligned = all(x_TW.stride(1) == 1 for x_TW in tensors_TW) and not any(n % 16 for n in (multiple_of, *starts))
    neighbours = 16 // tensors_TW[0].element_size() if aligned else 1
    return {"S": LANE_COLUMNS.value // neighbours, "E": neighbours, "num_warps": LANES.value // 32, "num_stages": 1}


def row_lanes(top_k: int) -> dict[str, int]:
    """One row a program, four entries a thread."""
    K = triton.next_power_of_2(max(1, top_k))
    return {"K": K, "num_warps": max(1, min(8, K // 128))}


@triton.jit
def place(parts, part_columns, width):
    """Row (int64), part, and the columns [start, stop) of this program."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    start = part * part_columns
    return row.to(tl.int64), part, start, tl.minimum(start + part_columns, width)


@triton.jit
def tile_columns(S: tl.constexpr, E: tl.constexpr):
    """Columns of a tile, [S, N, E], from its first."""
    s = tl.arange(0, S)[:, None, None]
    n = tl.arange(0, LANES)[None, :, None]
    e = tl.arange(0, E)[None, None, :]
    return s * (LANES * E) + n * E + e


@triton.jit
def load_tile(row_logits, first, stop, column_stride, S: tl.constexpr, E: tl.constexpr):
    """A tile as float32, -inf from `stop` on. Only a last tile is masked, for a mask would break the loads apart."""
    columns_SNE = tile_columns(S, E)
    logits = row_logits + tl.cast(first, tl.int64) * column_stride + columns_SNE.to(tl.int64) * column_stride
    if first + S * LANES * E <= stop:
        x_SNE = tl.load(logits, eviction_policy="evict_first").to(tl.float32)
    else:
        here = columns_SNE < stop - first
        x_SNE = tl.where(here, tl.load(logits, mask=here).to(tl.float32), -float("inf"))
    return x_SNE


@triton.jit
def store_tile(row_out, value_SNE, first, stop, whole_stop, column_stride, S: tl.constexpr, E: tl.constexpr):
    """Writes a tile, with 0 from `stop` on and nothing from `whole_stop` on."""
    columns_SNE = tile_columns(S, E)
    out = row_out + tl.cast(first, tl.int64) * column_stride + columns_SNE.to(tl.int64) * column_stride
    if first + S * LANES * E > stop:
        value_SNE = tl.where(columns_SNE < stop - first, value_SNE, 0.0)
    value_SNE = value_SNE.to(row_out.dtype.element_ty)
    if first + S * LANES * E <= whole_stop:
        tl.store(out, value_SNE)
    else:
        tl.store(out, value_SNE, mask=columns_SNE < whole_stop - first)


@triton.jit
def finite(x):
    """x with 0 for -inf, so that x - finite(x) is no NaN."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def logaddexp(a, b):
    top = finite(tl.maximum(a, b))
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def lane_max(x_SNE):
    return tl.max(tl.max(x_SNE, 2), 0)


@triton.jit
def lane_sum(x_SNE):
    return tl.sum(tl.sum(x_SNE, 2), 0)


@triton.jit
def no_columns():
    """Maximum and sums of nothing, for each lane."""
    zero_N = tl.zeros((LANES,), tl.float32)
    return zero_N - float("inf"), zero_N, zero_N


@triton.jit
def absorb(x_SNE, max_N, sum_N, sum_at_one_N, scale, AT_ONE: tl.constexpr):
    """Running maximum of each lane, and sums of exp2((x - max) * scale) and (AT_ONE) exp(x - max), with a tile more."""
    top_N = tl.maximum(max_N, lane_max(x_SNE))
    base_N = finite(top_N)
    # Subtracted before it is scaled: a scaled 1e4 is off by 5e-4.
    gap_N, below_SNE = max_N - base_N, x_SNE - base_N[None, :, None]
    sum_N = sum_N * tl.exp2(gap_N * scale) + lane_sum(tl.exp2(below_SNE * scale))
    if AT_ONE:
        sum_at_one_N = sum_at_one_N * tl.exp2(gap_N * IN_LOG2) + lane_sum(tl.exp2(below_SNE * IN_LOG2))
    return top_N, sum_N, sum_at_one_N


@triton.jit
def meet(max_N, sum_N, scale):
    """The sum of all lanes (or parts of a row), under their largest maximum."""
    return tl.sum(sum_N * tl.exp2((max_N - finite(tl.max(max_N, 0))) * scale), 0)
