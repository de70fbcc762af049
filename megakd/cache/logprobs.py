"""The log-probabilities of the entries in a codec, in the order of their ids.

With d = max - logprob >= 0, the distance to the token's most likely entry, R a token's largest d:

| codec           | stored                                     | bytes   | error of a log-probability, nats |
|-----------------|--------------------------------------------|---------|----------------------------------|
| fp32            | logprob                                    | 4 N     | 0                                |
| fp16            | d as float16                               | 2 N     | <= 2 * max(R * 2**-11, 2**-25)   |
| q8              | R' = R rounded up to float16, 255 d / R'   | 2 T + N | <= R' / 255                      |
| count8, count16 | how often the entry was drawn              | N, 2 N  | 0                                |

d has no offset; decoding restores it by scaling the entries to the mass that the tail leaves, sum_S P = 1 - e^log_tail.
That is why a bound is twice the rounding: the offset may move all entries by as much as one was rounded. For q8 the
KL(exact || decoded) is at most (R' / 255)**2 / 8: Hoeffding's lemma on roundings in an interval of R' / 255. To all of
it comes float32's own rounding. A d above 65504 is stored as that.

Sizes: T tokens, N entries of all tokens together.
"""

import numpy as np

from megakd.cache.segments import reduce_tokens, spread, uniform_count

CODECS = ("fp32", "fp16", "q8", "count8", "count16")
_ENTRY_BYTES = {"fp32": 4, "fp16": 2, "q8": 1, "count8": 1, "count16": 2}
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


def logprobs_bytes(codec: str, tokens: int, entries: int) -> int:
    """Bytes that the log-probabilities of `entries` entries take."""
    return _ENTRY_BYTES[codec] * entries + (2 * tokens if codec == "q8" else 0)


def encode_logprobs(logprobs_N: np.ndarray, counts_T: np.ndarray, codec: str, draws: int = 0) -> bytes:
    """Log-probabilities as bytes.

    Args:
        logprobs_N: float32, nats, finite, token after token; for count8 and count16 the log of count / draws.
        counts_T: entries of each token.
        draws: of count8 and count16.
    Raises:
        ValueError: a value that is not finite, or no log of a count.
    """
    logprobs_N = np.asarray(logprobs_N, np.float32)
    if not np.isfinite(logprobs_N).all():
        raise ValueError(f"log-probabilities must be finite, not {logprobs_N[~np.isfinite(logprobs_N)][0]}")
    if codec == "fp32":
        return logprobs_N.astype("<f4").tobytes()
    if codec in ("count8", "count16"):
        return _encode_counts(logprobs_N, codec, draws)
    top_T = reduce_tokens(np.maximum, logprobs_N, counts_T)
    distance_N = np.minimum(spread(top_T, counts_T) - logprobs_N, _LARGEST)
    if codec == "fp16":
        return distance_N.astype("<f2").tobytes()
    range_T = _round_up(reduce_tokens(np.maximum, distance_N, counts_T))
    steps_T = 255 / np.where(range_T > 0, range_T, 1).astype(np.float32)
    codes_N = np.rint(distance_N * spread(steps_T, counts_T)).astype(np.uint8)
    return range_T.astype("<f2").tobytes() + codes_N.tobytes()


def decode_logprobs(packed, counts_T: np.ndarray, codec: str, log_mass_T: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Log-probabilities of all entries.

    Args:
        packed: buffer of `logprobs_bytes(...)` bytes.
        log_mass_T: log of the mass that each token's entries have together, float64.
        scale: recorded temperature over the wanted one; the logs are multiplied by it before they are scaled to the
            mass. With fp32 and scale 1 the stored numbers are returned as they are.
    Returns:
        float32 [N].
    """
    tokens, entries = len(counts_T), int(counts_T.sum())
    if codec == "fp32":
        logs_N = np.frombuffer(packed, "<f4", entries)
        if scale == 1:
            return logs_N
        logs_N = (logs_N - spread(reduce_tokens(np.maximum, logs_N, counts_T), counts_T)) * np.float32(scale)
    elif codec == "fp16":
        logs_N = np.frombuffer(packed, "<f2", entries).astype(np.float32)
        logs_N *= np.float32(-scale)
    elif codec == "q8":
        step_T = np.frombuffer(packed, "<f2", tokens).astype(np.float32) * np.float32(-scale / 255)
        logs_N = np.frombuffer(packed, np.uint8, entries, 2 * tokens).astype(np.float32)
        logs_N *= spread(step_T, counts_T)
    else:
        counts_N = np.frombuffer(packed, "u1" if codec == "count8" else "<u2", entries)
        with np.errstate(divide="ignore"):
            logs_N = np.log(counts_N, dtype=np.float32)
    return scale_to_mass(logs_N, counts_T, log_mass_T)


def scale_to_mass(logs_N: np.ndarray, counts_T: np.ndarray, log_mass_T: np.ndarray) -> np.ndarray:
    """Adds one number to all entries of a token so that their mass becomes e^log_mass; writes to `logs_N`."""
    with np.errstate(divide="ignore"):
        offset_T = (log_mass_T - np.log(reduce_tokens(np.add, np.exp(logs_N), counts_T, 1.0))).astype(np.float32)
    if per_token := uniform_count(counts_T):
        table_TK = logs_N.reshape(-1, per_token)
        table_TK += offset_T[:, None]
    else:
        logs_N += spread(offset_T, counts_T)
    return logs_N


def log_mass(log_tail_T: np.ndarray) -> np.ndarray:
    """log(1 - e^log_tail) in float64, exact for a tail near 1 as for one near 0.

    Where the tail is all that float32 can tell it is that of the smallest float32: an entry has a finite logarithm.
    """
    log_tail_T = np.minimum(np.asarray(log_tail_T, np.float64), 0)
    return np.log(np.maximum(-np.expm1(log_tail_T), _SMALLEST))


def _round_up(range_T: np.ndarray) -> np.ndarray:
    """The next float16 at or above."""
    half_T = range_T.astype(np.float16)
    low_T = half_T.astype(np.float32) < range_T
    half_T[low_T] = np.nextafter(half_T[low_T], np.float16(np.inf))
    return half_T


def _encode_counts(logprobs_N: np.ndarray, codec: str, draws: int) -> bytes:
    dtype = np.dtype("u1" if codec == "count8" else "<u2")
    exact_N = np.exp(logprobs_N.astype(np.float64)) * draws
    counts_N = np.rint(exact_N)
    wrong_N = (np.abs(counts_N - exact_N) > 1e-3 * exact_N) | (counts_N < 1) | (counts_N > np.iinfo(dtype).max)
    if wrong_N.any():
        raise ValueError(f"a sampling weight of {np.exp(logprobs_N[wrong_N][0]):.6g} is no count of {draws} draws")
    return counts_N.astype(dtype).tobytes()
