"""Running text as training samples: documents in a row, cut into windows of one length."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megakd.data.order import permute
from megakd.data.token_files.reader import TokenFile
from megakd.errors import DataError

IGNORED = -100  # the label of a position that is not supervised
_KEPT_EPOCHS = 2  # a batch touches two epochs at most, except on a data set smaller than a batch


class TextDataset:
    """A token file read as windows of `sequence_length` tokens and their next tokens.

    An epoch lays all documents in a row, in an order of its own (stored order if `seed` is None), and cuts the row of
    T tokens every S = sequence_length: sample i has ids row[iS : iS+S] and labels row[iS+1 : iS+S+1]. So every token
    but the row's first is a label exactly once. The last window is filled with id 0 and label -100. Attention is not
    cut between the documents of a window; their eos tells the model.

    Args:
        prefix: a token file written by `megakd prepare text`.
        sequence_length: tokens of a sample.
        seed: selects the document orders; None keeps the stored order in every epoch (validation).
        tokenizer_fingerprint: refuse a file written with another tokenizer; None accepts any.

    Attributes:
        file: the open `TokenFile`.
        tokens_per_epoch: supervised tokens, T - 1.
        counts: "samples" of an epoch; "skipped", records that tokenization had to leave out.

    Raises:
        DataError: see `TokenFile`; or the file holds a single token.
    """

    def __init__(
        self, prefix: str | Path, sequence_length: int, seed: int | None, tokenizer_fingerprint: str | None = None
    ):
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be positive, got {sequence_length}")
        self.file = TokenFile(prefix, tokenizer_fingerprint)
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokens_per_epoch = self.file.info.tokens - 1
        if self.tokens_per_epoch < 1:
            raise DataError(f"{prefix} holds {self.file.info.tokens} token(s), too few for one prediction")
        self.counts = {"samples": len(self), "skipped": self.file.info.skipped}
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return -(-self.tokens_per_epoch // self.sequence_length)

    @property
    def mean_length(self) -> float:
        """Ids of a sample on average."""
        return self.tokens_per_epoch / len(self)

    def length(self, epoch: int, index: int) -> int:
        """Ids of one sample: sequence_length for all."""
        return self.sequence_length

    def sample(self, epoch: int, index: int) -> dict:
        """One sample, the same whenever and wherever it is asked for.

        Returns:
            ids: int64[S]; labels: int64[S], label t is the token after id t, -100 where there is none; segments: [S].

        Raises:
            DataError: a token is not an id of the vocabulary (the file was changed).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        length = self.sequence_length
        row = self._read_row(epoch, index * length, length + 1)
        self.file.check_ids(row)
        ids = np.zeros(length, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        ids[: min(length, row.size)] = row[:length]
        labels[: row.size - 1] = row[1:]
        return {"ids": ids, "labels": labels, "segments": [length]}

    def _read_row(self, epoch: int, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of an epoch's row, fewer at its end, as int64."""
        documents, ends = self._order(epoch)
        stop = min(start + count, int(ends[-1]))
        place = int(np.searchsorted(ends, start, side="right"))
        parts = []
        while start < stop:
            left = min(int(ends[place]), stop) - start  # of the document at this place, as far as it is wanted
            document_end = int(self.file.starts[documents[place]]) + int(self.file.lengths[documents[place]])
            parts.append(self.file.read_tokens(document_end - (int(ends[place]) - start), left))
            start += left
            place += 1
        return np.concatenate(parts).astype(np.int64)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents, ends): an epoch's document order and, for each place in it, the row's length up to its end."""
        if self.seed is None:
            epoch = 0
        if epoch not in self._epochs:
            documents = np.arange(len(self.file))
            if self.seed is not None:
                documents = permute(documents, len(self.file), self.seed, epoch, 1)
            self._epochs[epoch] = (documents, np.cumsum(self.file.lengths[documents], dtype=np.int64))
            if len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


def batch_length(dataset, indices: Sequence[tuple[int, int] | None], multiple: int = 1) -> int:
    """How long the rows of a global batch must be: its longest sample, rounded up to a multiple, at most the maximum.

    The same for all ranks and micro-batches of a step if they pass the indices of the whole global batch.

    Args:
        dataset: as for `load_batch`.
        indices: of the global batch.
        multiple: what the length must be divisible by (tp with sequence parallelism); it divides sequence_length.
    """
    if dataset.sequence_length % multiple:
        raise ValueError(f"sequence_length {dataset.sequence_length} is not a multiple of {multiple}")
    longest = max((dataset.length(*index) for index in indices if index is not None), default=1)
    return -(-longest // multiple) * multiple


def load_batch(dataset, indices: Sequence[tuple[int, int] | None], length: int | None = None) -> dict:
    """Stack samples into one micro-batch, filled up at the end with id 0 and label -100.

    A row may hold several segments (packed samples) that must not see each other. What fills a row up belongs to its
    last segment, which cannot see it.

    Args:
        dataset: anything with `sequence_length` and `sample(epoch, index)`.
        indices: B pairs (epoch, index); None gives a row without supervised tokens (id 0, label -100 throughout).
        length: S, ids of a row; None is the dataset's sequence_length.

    Returns:
        ids: int64 torch.Tensor[B, S]; labels: int64 torch.Tensor[B, S], -100 = not supervised; segments: for
        each row the lengths of its segments, which add up to S; lengths: for each row how many of its ids are a
        sample's, 0 for None.
    """
    import torch

    length = length or dataset.sequence_length
    ids = np.zeros((len(indices), length), np.int64)
    labels = np.full((len(indices), length), IGNORED, np.int64)
    segments, used_lengths = [], []
    for row, index in enumerate(indices):
        lengths, used = [length], 0
        if index is not None:
            sample = dataset.sample(*index)
            used = len(sample["ids"])
            ids[row, :used], labels[row, :used] = sample["ids"], sample["labels"]
            lengths = [*sample["segments"][:-1], sample["segments"][-1] + length - used]
        segments.append(lengths)
        used_lengths.append(used)
    return {
        "ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "segments": segments,
        "lengths": used_lengths,
    }
