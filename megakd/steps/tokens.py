"""Supervised tokens of two records of one step, joined by sample and position, and how far apart they are.

Legend: J tokens that both records have, M entries of a teacher.
"""

import dataclasses

import numpy as np

from megakd.steps.whole import WholeStep


@dataclasses.dataclass(frozen=True)
class Joined:
    """Tokens that two records have in common.

    Attributes:
        a, b: the records.
        a_J, b_J: numbers of the tokens in each.
    """

    a: WholeStep
    b: WholeStep
    a_J: np.ndarray
    b_J: np.ndarray

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.a.tokens[name][self.a_J].astype(np.float64), self.b.tokens[name][self.b_J].astype(np.float64)

    def where(self, j: int) -> str:
        token = self.a_J[j]
        return f"{self.a.name(int(self.a.sample_T[token]))}, position {int(self.a.position_T[token])}"


def join_tokens(a: WholeStep, b: WholeStep, a_samples: np.ndarray, b_samples: np.ndarray) -> Joined:
    """Join by sample and position.

    Args:
        a_samples, b_samples: numbers of the samples that are compared, pair by pair.
    """

    def keys(step: WholeStep, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pair_N = np.full(len(step.start_N), -1)
        pair_N[samples] = np.arange(len(samples))
        pair_T = pair_N[step.sample_T]
        kept = np.flatnonzero(pair_T >= 0)
        return pair_T[kept] << 31 | step.position_T[kept], kept

    (a_keys, a_kept), (b_keys, b_kept) = keys(a, a_samples), keys(b, b_samples)
    _, a_at, b_at = np.intersect1d(a_keys, b_keys, assume_unique=True, return_indices=True)
    return Joined(a, b, a_kept[a_at], b_kept[b_at])


def excess(a: np.ndarray, b: np.ndarray, tolerance: float) -> np.ndarray:
    """|a - b| over what is allowed, `tolerance` x max(1, |a|): above 1 it is a difference; NaN equals NaN alone."""
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        over = np.abs(a - b) / (tolerance * np.maximum(1.0, np.abs(np.where(np.isfinite(a), a, 0.0))))
    return np.where(alike, 0.0, np.where(np.isnan(over), np.inf, over))


def target_excess(joined: Joined, tolerance: float) -> tuple[np.ndarray, dict[int, str]]:
    """How far the teacher's words are apart, over what is allowed, for each token; and what is worst of it, in words.

    Compared are the log-probability of every entry that both have, the tail and the label's log-probability. An entry
    that one has alone is none of the other's K most likely ones: that is no difference where it would have been as
    likely as the last of them, within what is allowed, for ties are broken by the last bit.

    Returns:
        over_J: above 1 is a difference.
        words: of the tokens with a difference, by their number in J.
    """
    a, b, count = joined.a, joined.b, len(joined.a_J)
    over_J, said = np.zeros(count), {}

    def add(at: np.ndarray, over: np.ndarray, words) -> None:
        """Entries `at` tokens J; `words` says one of them."""
        for i in np.flatnonzero(over > 1):
            if over[i] > over_J[at[i]]:
                over_J[at[i]], said[int(at[i])] = over[i], words(i)
        np.maximum.at(over_J, at, over)

    for name, title in (("log_tail", "log of the mass outside the entries"), ("label_logprob", "of the label")):
        x, y = joined.pair(name)
        over = excess(x, y, tolerance)
        if name == "label_logprob":  # not known of an imported recording
            over = np.where(np.isnan(x) | np.isnan(y), 0.0, over)
        add(np.arange(count), over, lambda i, x=x, y=y, title=title: f"{title}: {x[i]:.4f} -> {y[i]:.4f}")
    (a_token, a_id, a_logprob), (b_token, b_id, b_logprob) = entries(a, joined.a_J), entries(b, joined.b_J)
    a_key, b_key = a_token << 32 | a_id, b_token << 32 | b_id
    _, i, k = np.intersect1d(a_key, b_key, assume_unique=True, return_indices=True)
    over = excess(a_logprob[i], b_logprob[k], tolerance)
    add(a_token[i], over, lambda n: f"id {a_id[i[n]]}: logprob {a_logprob[i[n]]:.4f} -> {b_logprob[k[n]]:.4f}")
    sides = (
        (a_token, a_id, a_logprob, i, least(b_token, b_logprob, count), "is not among the entries of the replay"),
        (b_token, b_id, b_logprob, k, least(a_token, a_logprob, count), "is not among the recorded entries"),
    )
    for token, ids, logprob, common, least_J, text in sides:
        alone = np.setdiff1d(np.arange(len(token)), common, assume_unique=True)
        over = excess(logprob[alone], least_J[token[alone]], tolerance)

        def words(n, ids=ids, logprob=logprob, alone=alone, text=text, token=token, least_J=least_J) -> str:
            last = least_J[token[alone[n]]]
            return f"id {ids[alone[n]]} (logprob {logprob[alone[n]]:.4f}) {text}, whose last one has {last:.4f}"

        add(token[alone], over, words)
    return over_J, said


def entries(step: WholeStep, token_J: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The teacher's entries of some tokens, as (number in J, id, logprob)."""
    j_T = np.full(len(step.sample_T), -1)
    j_T[token_J] = np.arange(len(token_J))
    j_M = j_T[step.token_M]
    kept = np.flatnonzero(j_M >= 0)
    return j_M[kept], step.id_M[kept].astype(np.int64), step.logprob_M[kept].astype(np.float64)


def least(token: np.ndarray, logprob: np.ndarray, count: int) -> np.ndarray:
    """The smallest log-probability of each token's entries; -inf of a token without."""
    least_J = np.full(count, np.inf)
    np.minimum.at(least_J, token, logprob)
    return np.where(np.isposinf(least_J), -np.inf, least_J)
