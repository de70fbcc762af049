"""Whole numbers of a fixed number of bits: full bytes as byte planes, the bits above them as bit planes.

Number i of n, with b = 8 * B + r bits, has its lowest byte at plane 0, position i, and so on for B byte planes of n
bytes; bit 8 * B + j is bit i % 8 of byte i // 8 of bit plane j, each ceil(n / 8) bytes. So packing wastes less than a
byte per plane, and both ways are a few passes over arrays whatever b is.

Sizes: N numbers.
"""

import numpy as np

_DTYPES = ((8, np.dtype("u1")), (16, np.dtype("<u2")), (32, np.dtype("<u4")), (64, np.dtype("<u8")))


def dtype_of(bits: int) -> np.dtype:
    """The smallest unsigned little-endian type of at least `bits` bits."""
    return next(dtype for width, dtype in _DTYPES if bits <= width)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` bits take."""
    return bits // 8 * count + bits % 8 * ((count + 7) // 8)


def pack(values_N: np.ndarray, bits: int) -> bytes:
    """Numbers in [0, 2**bits) as planes; higher bits are cut off."""
    values_N = np.ascontiguousarray(values_N, dtype=dtype_of(bits))
    planes = [(values_N >> values_N.dtype.type(8 * i)).astype(np.uint8).tobytes() for i in range(bits // 8)]
    rest_N = (values_N >> values_N.dtype.type(bits // 8 * 8)).astype(np.uint8) if bits % 8 else None
    planes += [np.packbits(rest_N >> i & 1, bitorder="little").tobytes() for i in range(bits % 8)]
    return b"".join(planes)


def unpack(packed, count: int, bits: int) -> np.ndarray:
    """What `pack` was given.

    Args:
        packed: buffer of exactly `packed_bytes(count, bits)` bytes.
    Returns:
        [N] of `dtype_of(bits)`.
    """
    dtype = dtype_of(bits)
    packed = np.frombuffer(packed, np.uint8)
    if packed.size != packed_bytes(count, bits):
        raise ValueError(f"{count} numbers of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.size}")
    full = bits // 8
    values_N = np.zeros(count, dtype)
    for i in range(full):
        values_N |= packed[i * count : (i + 1) * count].astype(dtype) << dtype.type(8 * i)
    if bits % 8:
        plane_bytes = (count + 7) // 8
        rest_N = np.zeros(count, np.uint8)
        for i in range(bits % 8):
            first = full * count + i * plane_bytes
            plane = np.unpackbits(packed[first : first + plane_bytes], count=count, bitorder="little")
            rest_N |= plane << np.uint8(i)
        values_N |= rest_N.astype(dtype) << dtype.type(8 * full)
    return values_N
