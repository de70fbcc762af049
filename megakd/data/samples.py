"""Samples of their own (an answer, a conversation): one by one, or several packed into one sequence.

Both datasets have what `TextDataset` has: `len`, `sequence_length`, `sample(epoch, index)`, `length(epoch, index)`.
"""

from pathlib import Path

import numpy as np

from megakd.data.dataset import IGNORED
from megakd.data.packing import pack_best_fit
from megakd.data.token_files.reader import TokenFile
from megakd.errors import DataError


class SampleDataset:
    """A masked token file, a sample each document; longer ones are cut after sequence_length + 1 tokens.

    A sample of n tokens has n - 1 ids and labels: label t is token t + 1, -100 where that is not supervised. A sample
    whose every supervised token was cut away is dropped and counted. The order of an epoch is `order.batch_indices`'.

    Args:
        prefix: a token file with a mask.
        sequence_length: most ids of a sample.
        tokenizer_fingerprint: refuse a file written with another tokenizer; None accepts any.

    Attributes:
        file: the open `TokenFile`.
        counts: "samples" of the dataset; "truncated", how many of them were cut; "dropped"; "skipped", records that
            tokenization had to leave out.

    Raises:
        DataError: see `TokenFile`; or no sample is left.
    """

    def __init__(self, prefix: str | Path, sequence_length: int, tokenizer_fingerprint: str | None = None):
        self.file = TokenFile(prefix, tokenizer_fingerprint)
        self.sequence_length = sequence_length
        kept = self.file.firsts <= sequence_length
        self._documents = np.flatnonzero(kept)
        self._lengths = np.minimum(self.file.lengths[self._documents] - 1, sequence_length)
        self.counts = {
            "samples": len(self._documents),
            "truncated": int((self.file.lengths[self._documents] - 1 > sequence_length).sum()),
            "dropped": int(len(kept) - len(self._documents)),
            "skipped": self.file.info.skipped,
        }
        if not len(self._documents):
            raise DataError(
                f"none of the {len(kept):,} samples of {prefix} has a supervised token in its first "
                f"{sequence_length + 1} tokens",
                hint="lengthen data.sequence_length, or look at the samples with `megakd prepare inspect`",
            )

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def mean_length(self) -> float:
        """Ids of a sample on average."""
        return float(self._lengths.mean())

    def length(self, epoch: int, index: int) -> int:
        """Ids of one sample."""
        return int(self._lengths[index])

    def lengths(self) -> np.ndarray:
        """Ids of every sample, int32."""
        return self._lengths

    def sample(self, epoch: int, index: int) -> dict:
        """One sample, the same in every epoch.

        Returns:
            ids, labels: int64[n], n <= sequence_length; segments: [n].
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        document = self._documents[index]
        start, length = int(self.file.starts[document]), int(self._lengths[index])
        tokens = self.file.read_tokens(start, length + 1).astype(np.int64)
        self.file.check_ids(tokens)
        labels = np.where(self.file.read_mask(start + 1, length), tokens[1:], IGNORED)
        return {"ids": tokens[:-1], "labels": labels, "segments": [length]}


class PackedDataset:
    """The samples of a dataset, several in one sequence; a pack is a sample here, the same in every epoch.

    Best fit: samples from the longest to the shortest, each into the fullest sequence that still has room. Positions
    start again at every sample and no sample sees another (`segments`), so that every label is predicted as it is
    without packing.

    Args:
        samples: what to pack.
        seed: of the choice among samples of one length.
    """

    def __init__(self, samples: SampleDataset, seed: int):
        self.samples = samples
        self.sequence_length = samples.sequence_length
        every = samples.lengths()
        self._members, self._ends = pack_best_fit(every, self.sequence_length, seed)
        self._filled = np.add.reduceat(every[self._members], np.concatenate([[0], self._ends[:-1]]))
        self.counts = samples.counts | {"packs": len(self._ends)}

    @property
    def file(self) -> TokenFile:
        return self.samples.file

    @property
    def fill(self) -> float:
        """Share of the sequences' places that hold a token."""
        return float(self._filled.sum() / (len(self) * self.sequence_length))

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def mean_length(self) -> float:
        """Ids of a pack on average."""
        return float(self._filled.mean())

    def length(self, epoch: int, index: int) -> int:
        """Ids of one pack."""
        return int(self._filled[index])

    def members(self, index: int) -> np.ndarray:
        """Indices of a pack's samples in `samples`, in their order."""
        return self._members[self._ends[index - 1] if index else 0 : self._ends[index]]

    def sample(self, epoch: int, index: int) -> dict:
        """One pack.

        Returns:
            ids, labels: int64[n], the samples' in a row; segments: the length of each.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        parts = [self.samples.sample(epoch, int(member)) for member in self.members(index)]
        return {
            "ids": np.concatenate([part["ids"] for part in parts]),
            "labels": np.concatenate([part["labels"] for part in parts]),
            "segments": [length for part in parts for length in part["segments"]],
        }
