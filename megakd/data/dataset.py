"""Running text as training samples: documents in a row, cut into windows of one length."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megakd.data.indexed import TokenFile
from megakd.data.order import permute
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
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return -(-self.tokens_per_epoch // self.sequence_length)

    def sample(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """One sample, the same whenever and wherever it is asked for.

        Returns:
            ids: int64[S]; labels: int64[S], label t is the token after id t, -100 where there is none.

        Raises:
            DataError: a token is not an id of the vocabulary (the file was changed).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        length = self.sequence_length
        row = self._read_row(epoch, index * length, length + 1)
        vocab_size = self.file.info.vocab_size
        if row.min() < 0 or row.max() >= vocab_size:
            raise DataError(
                f"{self.file.prefix}.bin holds token {row.max() if row.min() >= 0 else row.min()}, "
                f"its vocabulary has {vocab_size} ids",
                hint="the file is damaged: copy it again, or prepare the data again",
            )
        ids = np.zeros(length, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        ids[: min(length, row.size)] = row[:length]
        labels[: row.size - 1] = row[1:]
        return {"ids": ids, "labels": labels}

    def _read_row(self, epoch: int, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of an epoch's row, fewer at its end, as int64."""
        documents, ends = self._order(epoch)
        stop = min(start + count, int(ends[-1]))
        place = int(np.searchsorted(ends, start, side="right"))
        parts = []
        while start < stop:
            tokens = self.file.document(documents[place])
            offset = start - (int(ends[place]) - len(tokens))
            parts.append(tokens[offset : offset + stop - start])
            start += len(parts[-1])
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


def load_batch(dataset, indices: Sequence[tuple[int, int] | None]) -> dict:
    """Stack samples into the tensors of one micro-batch.

    Args:
        dataset: anything with `sequence_length` and `sample(epoch, index)`.
        indices: B pairs (epoch, index); None gives a row without supervised tokens (id 0, label -100 throughout).

    Returns:
        ids: int64 torch.Tensor[B, S]; labels: int64 torch.Tensor[B, S], -100 = not supervised.
    """
    import torch

    length = dataset.sequence_length
    empty = {"ids": np.zeros(length, np.int64), "labels": np.full(length, IGNORED, np.int64)}
    rows = [empty if index is None else dataset.sample(*index) for index in indices]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("ids", "labels")}
