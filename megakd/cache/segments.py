"""Sums and maxima over the entries of each token, when tokens have different numbers of entries.

Sizes: T tokens, N entries of all tokens together, token after token.
"""

import numpy as np


def reduce_tokens(ufunc: np.ufunc, values_N: np.ndarray, counts_T: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """`ufunc` (np.add, np.maximum) over each token's entries; `empty` for a token without entries.

    Returns:
        [T], of the values' dtype.
    """
    if per_token := uniform_count(counts_T):
        return ufunc.reduce(values_N.reshape(-1, per_token), axis=1)
    reduced_T = np.full(len(counts_T), empty, values_N.dtype)
    used_T = counts_T > 0
    if used_T.any():
        reduced_T[used_T] = ufunc.reduceat(values_N, starts(counts_T)[used_T])
    return reduced_T


def spread(values_T: np.ndarray, counts_T: np.ndarray) -> np.ndarray:
    """A token's value for each of its entries, [N]."""
    return np.repeat(values_T, counts_T)


def starts(counts_T: np.ndarray) -> np.ndarray:
    """Where each token's entries begin, int64 [T]."""
    return np.cumsum(counts_T) - counts_T


def uniform_count(counts_T: np.ndarray) -> int:
    """The number of entries that every token has; 0 when they differ, or have none."""
    first = int(counts_T[0]) if len(counts_T) else 0
    return first if (counts_T == first).all() else 0
