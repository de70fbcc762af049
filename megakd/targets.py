"""TeacherTargets: what the teacher says about each token. Teachers make it, caches store it, losses read it.

Sizes: T tokens, K entries kept per token.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's K entries per token and the mass outside of them.

    Args:
        ids_TK: global token ids, unique within a row, in any order; -1 is an empty slot; int64. On a sharded
            vocabulary a rank may hold all entries of a row or only those of its own shard (the rest is empty).
        logprobs_TK: log-probabilities under the teacher's full softmax at `temperature`, in nats; -inf in an empty
            slot; float32.
        log_tail_T: log of the teacher's mass outside the K entries of all ranks, in nats; -inf when they are the
            whole vocabulary or stand for it (sampled targets); float32.
        temperature: what the teacher's logits were divided by.
        entropy_T: exact entropy of the teacher in nats, float32; only sampled targets have it, for which
            `logprobs_TK` are the logs of the sampling weights.
    """

    ids_TK: Tensor
    logprobs_TK: Tensor
    log_tail_T: Tensor
    temperature: float = 1.0
    entropy_T: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of rows T."""
        return self.ids_TK.shape[0]

    @property
    def top_k(self) -> int:
        """Number of slots per row K."""
        return self.ids_TK.shape[1]

    def rows(self, index) -> "TeacherTargets":
        """The targets of some tokens: `index` is whatever indexes the first axis of a tensor."""
        entropy_T = None if self.entropy_T is None else self.entropy_T[index]
        return replace(
            self,
            ids_TK=self.ids_TK[index],
            logprobs_TK=self.logprobs_TK[index],
            log_tail_T=self.log_tail_T[index],
            entropy_T=entropy_T,
        )

    def to(self, device) -> "TeacherTargets":
        """The same targets on another device."""
        entropy_T = None if self.entropy_T is None else self.entropy_T.to(device)
        return replace(
            self,
            ids_TK=self.ids_TK.to(device),
            logprobs_TK=self.logprobs_TK.to(device),
            log_tail_T=self.log_tail_T.to(device),
            entropy_T=entropy_T,
        )

    def check_shapes(self) -> None:
        """Raises ValueError unless shapes, dtypes and temperature fit together; reads no tensor's content."""
        ids, logprobs, tail = self.ids_TK, self.logprobs_TK, self.log_tail_T
        if ids.dim() != 2 or logprobs.shape != ids.shape or tail.shape != ids.shape[:1]:
            raise ValueError(
                f"teacher targets must be ids [T, K], logprobs [T, K] and log_tail [T], "
                f"not {list(ids.shape)}, {list(logprobs.shape)} and {list(tail.shape)}"
            )
        if ids.dtype != torch.int64 or logprobs.dtype != torch.float32 or tail.dtype != torch.float32:
            raise ValueError(
                f"teacher targets must be int64 ids, float32 logprobs and float32 log_tail, "
                f"not {ids.dtype}, {logprobs.dtype} and {tail.dtype}"
            )
        if self.entropy_T is not None and self.entropy_T.shape != tail.shape:
            raise ValueError(f"entropy must be [T] = {list(tail.shape)}, not {list(self.entropy_T.shape)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, not {self.temperature}")

    def check(self) -> None:
        """Raises ValueError unless the record is what the class says; reads every entry, so once, where it is made.

        The total of a row may be below 1 (a rank that holds its own entries only) but not above 1 + 1e-3.
        """
        self.check_shapes()
        ids, logprobs, tail = self.ids_TK, self.logprobs_TK, self.log_tail_T
        ordered, used = ids.sort(1).values, ids >= 0
        total_T = logprobs.exp().sum(1) + tail.exp()
        faults = {
            "an id below -1": ids < -1,
            "an id twice in a row": (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0),
            "a log-probability that is NaN or above 0": ~(logprobs <= 1e-3),
            "an empty slot (id -1) whose log-probability is not -inf": ~used & ~logprobs.isneginf(),
            "an id whose log-probability is -inf": used & logprobs.isneginf(),
            "a log_tail that is NaN or above 0": ~(tail <= 1e-3),
            "entries and tail that sum to more than 1": ~(total_T <= 1 + 1e-3),
        }
        if self.entropy_T is not None:
            faults["an entropy that is not finite or below 0"] = ~(
                self.entropy_T.isfinite() & (self.entropy_T >= -1e-3)
            )
        for fault, bad in faults.items():
            if bad.any():
                row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
                raise ValueError(
                    f"teacher targets hold {fault}, first in row {row}: ids {ids[row, :4].tolist()}…, "
                    f"logprobs {logprobs[row, :4].tolist()}…, log_tail {tail[row].item():.6g}"
                )


def sample_key(ids) -> bytes:
    """The identity of a sample: its content, whatever file, order, batch or layout it comes in.

    Made after truncation and before packing or padding, so two runs that cut a text at other lengths have other keys.

    Args:
        ids: the sample's token ids, in [0, 2**32), without padding.
    Returns:
        16 bytes: BLAKE2b of the ids as little-endian uint32, personalised with `megakd sample 1`.
    """
    content = np.ascontiguousarray(ids, dtype="<u4")
    return hashlib.blake2b(content, digest_size=16, person=b"megakd sample 1").digest()
