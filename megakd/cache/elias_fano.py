"""The ids of a sample's entries, ascending in each token, in an Elias-Fano code.

An id is cut into a low part of L bits and a high part id >> L in [0, H), H = ceil(V / 2**L). The low parts are packed
as they are (`bits`). The high parts become one row of bits: token t's id number i of the sample (counted over all
tokens) sets bit t * H + (id >> L) + i. So token t owns H zeros and as many ones as it has entries; where every token
has K entries each has the same stride of H + K bits. L is the largest number with 2**L <= V * T / max(N, T), which
makes H about the mean number of entries: about 2 + log2(V / K) bits an id, 104 bytes for K = 64 of V = 131,072.

Sizes: T tokens, N entries of all tokens together.
Source: Elias, J. ACM 21(2), 1974; Fano, MIT Project MAC memo 61, 1971.
"""

import numpy as np

from megakd.cache.bits import pack, packed_bytes, unpack


def low_bits(vocab_size: int, tokens: int, entries: int) -> int:
    """L, from what the reader knows too: floor(log2(V * T / max(N, T))), 0 at least."""
    return max((vocab_size * tokens // max(entries, tokens, 1)).bit_length() - 1, 0)


def upper_bytes(vocab_size: int, tokens: int, entries: int) -> int:
    """Bytes of the high parts."""
    return (entries + tokens * _highs(vocab_size, low_bits(vocab_size, tokens, entries)) + 7) // 8


def ids_bytes(vocab_size: int, tokens: int, entries: int) -> int:
    """Bytes of low and high parts together."""
    low = low_bits(vocab_size, tokens, entries)
    return packed_bytes(entries, low) + upper_bytes(vocab_size, tokens, entries)


def _highs(vocab_size: int, low: int) -> int:
    return ((vocab_size - 1) >> low) + 1


def encode_ids(ids_N: np.ndarray, counts_T: np.ndarray, vocab_size: int) -> bytes:
    """Low parts, then high parts.

    Args:
        ids_N: int64, token after token, ascending and unique within a token, in [0, vocab_size).
        counts_T: entries of each token; their sum is N.
    Raises:
        ValueError: the ids are not so.
    """
    tokens, entries = len(counts_T), len(ids_N)
    token_N = np.repeat(np.arange(tokens, dtype=np.int64), counts_T)
    if len(token_N) != entries:
        raise ValueError(f"{entries} ids, but the tokens' counts sum to {len(token_N)}")
    if entries and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocab_size:
        raise ValueError(f"ids must be in [0, {vocab_size}), not in [{ids_N.min()}, {ids_N.max()}]")
    if ((np.diff(ids_N) <= 0) & (np.diff(token_N) == 0)).any():
        raise ValueError("the ids of a token must ascend, each once")
    low = low_bits(vocab_size, tokens, entries)
    highs = _highs(vocab_size, low)
    upper = np.zeros(entries + tokens * highs, np.uint8)
    upper[(ids_N >> low) + token_N * highs + np.arange(entries)] = 1
    lower_N = ids_N & ((1 << low) - 1)
    return pack(lower_N, low) + np.packbits(upper, bitorder="little").tobytes()


def decode_ids(packed, tokens: int, entries: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """What `encode_ids` was given.

    Args:
        packed: buffer of `ids_bytes(...)` bytes.
    Returns:
        ids_N: int64. counts_T: int64.
    Raises:
        ValueError: this is no such code: not N ones, or an id outside the vocabulary.
    """
    low = low_bits(vocab_size, tokens, entries)
    highs = _highs(vocab_size, low)
    lower_bytes = packed_bytes(entries, low)
    upper = np.unpackbits(
        np.frombuffer(packed, np.uint8)[lower_bytes:], count=entries + tokens * highs, bitorder="little"
    )
    ids_N = np.flatnonzero(upper.view(bool))
    if len(ids_N) != entries:
        raise ValueError(f"{len(ids_N)} entries are coded where {entries} should be")
    uniform = tokens and entries % tokens == 0
    per_token = entries // tokens if uniform else 0
    ids_TK = ids_N.reshape(tokens, per_token) if per_token else None
    if per_token and _fits_stride(ids_TK, highs):
        ids_TK -= np.arange(per_token)
        ids_TK -= (np.arange(tokens) * (highs + per_token))[:, None]
        counts_T = np.full(tokens, per_token, np.int64)
    else:
        ids_N -= np.arange(entries)
        counts_T = np.bincount(ids_N // highs, minlength=tokens)
        ids_N %= highs
    if low:
        ids_N <<= low
        ids_N |= unpack(packed[:lower_bytes], entries, low)
    if entries and int(ids_N.max()) >= vocab_size:
        raise ValueError(f"id {int(ids_N.max())} is coded in a vocabulary of {vocab_size}")
    return ids_N, counts_T


def _fits_stride(positions_TK: np.ndarray, highs: int) -> bool:
    """Whether every token has its K ones in its own stride, which ends with a zero, so that no division is needed."""
    tokens, per_token = positions_TK.shape
    start_T = np.arange(tokens) * (highs + per_token)
    last_T = start_T + highs + per_token - 1
    return bool((positions_TK[:, 0] >= start_T).all() and (positions_TK[:, -1] < last_T).all())
