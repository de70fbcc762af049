"""Encoding and writing a cache's rows beside the teacher's forward passes."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megakd.cache import Contents, HiddenRow, Row, decode_row, encode_row, publish_part
from megakd.cache.segments import reduce_tokens
from megakd.cache.shard import ShardWriter

LOG = logging.getLogger("megakd")


class PartWriter:
    """Encodes rows and publishes them part by part, in threads; at most one batch of rows and one part wait.

    What fails in a thread is raised by a later call, at the latest when the `with` block ends.

    Args:
        folder: of the cache.
        contents: of its rows.
        enabled: False on ranks that write nothing.
    """

    def __init__(self, folder, contents: Contents, enabled: bool):
        self.folder, self.contents, self.enabled = folder, contents, enabled
        self.pool = ThreadPoolExecutor(2, "megakd-cache-writer")
        self.encoding: Future | None = None
        self.publishing: Future | None = None
        self.shard = ShardWriter()
        self.tokens, self.bytes, self.measured = 0, 0, False

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)

    @property
    def bytes_per_token(self) -> float:
        """Payload of the rows written so far; nan before the first."""
        return self.bytes / self.tokens if self.tokens else float("nan")

    def add(self, rows: list[Row | HiddenRow]) -> None:
        """Append rows to the part; returns when the rows before these are encoded.

        Raises:
            CacheError: the part before could not be written.
        """
        if self.enabled and rows:
            self._wait(publishing=self.publishing is not None and self.publishing.done())
            self.encoding = self.pool.submit(self._add, rows)

    def publish(self, part: int) -> None:
        """Begin to publish what was added since the last call as a part; returns when the part before is published.

        Raises:
            CacheError: the part before could not be written.
        """
        if self.enabled:
            self._wait()
            shard, self.shard = self.shard, ShardWriter()
            self.publishing = self.pool.submit(publish_part, self.folder, part, shard)

    def _wait(self, *, publishing: bool = True) -> None:
        if self.encoding is not None:
            self.encoding.result()
            self.encoding = None
        if publishing and self.publishing is not None:
            self.publishing.result()
            self.publishing = None

    def _add(self, rows: list[Row | HiddenRow]) -> None:
        for row in rows:
            encoded = encode_row(row, self.contents)
            self.shard.add(encoded)
            self.tokens += encoded.tokens
            self.bytes += len(encoded.payload)
        if not self.measured:
            self.measured = True
            LOG.info("codec %s: %s", self.contents.codec, describe_error(rows, self.contents))


def describe_error(rows: list[Row | HiddenRow], contents: Contents) -> str:
    """What the codec costs, of some rows."""
    if contents.hidden_size:
        exact_TH = torch.cat([row.hidden_TH for row in rows]).double()
        got_TH = torch.cat([decode_row(encode_row(row, contents), contents).hidden_TH for row in rows]).double()
        share = float((got_TH - exact_TH).norm() / exact_TH.norm().clamp(min=1e-300))
        return f"hidden states are stored to {share:.1e} of their norm"
    mean, most = codec_error(rows, contents)
    return f"KL(teacher || stored) mean {mean:.2e}, most {most:.2e} nats a token"


def codec_error(rows: list[Row], contents: Contents) -> tuple[float, float]:
    """Mean and largest KL, in nats a token, from the recorded distributions to what reads back; entries and tail."""
    errors = []
    for row in rows:
        got = decode_row(encode_row(row, contents), contents)
        exact_N = row.logprobs_N.astype(np.float64)
        errors.append(reduce_tokens(np.add, np.exp(exact_N) * (exact_N - got.logprobs_N), row.counts_T))
    error_T = np.concatenate(errors)
    return float(error_T.mean()), float(error_T.max())
