"""One micro-batch on the device: what the models read, which rows the loss sees, where its samples are.

Legend: B samples, S sequence, T supervised tokens of the micro-batch.
"""

import dataclasses
import functools
import itertools

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megakd.kernels.vocab import MASKED
from megakd.models.context import own_positions


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Token ids and their labels.

    A micro-batch with packed rows is one row, B = 1: all its rows one after the other, cut into `segments` that do
    not attend to each other.

    Attributes:
        ids_BS: int64.
        labels_BS: int64, the token after each; -100 where nothing is to be learnt.
        segments: lengths of the parts of the one row; None when every row is one sequence.
        samples: (row, start, stop) of each sample; what lies outside fills rows up. None: every row is one sample.
        cut: (this rank, ranks) that the sequences are cut over; ids and labels are whole, rows and models see a part.
        teachers: of each sample, the number of the teacher of its source, -1 where nothing of its row is supervised;
            None where there is one teacher.
    """

    ids_BS: Tensor
    labels_BS: Tensor
    segments: tuple[int, ...] | None = None
    samples: tuple[tuple[int, int, int], ...] | None = None
    cut: tuple[int, int] = (0, 1)
    teachers: tuple[int, ...] | None = None

    def __post_init__(self):
        assert self.cut[1] == 1 or self.segments is None, "packed rows are not cut"

    @functools.cached_property
    def own_S(self) -> Tensor | None:
        """Positions of this rank's part, ascending; None where it is the whole."""
        if self.cut[1] == 1:
            return None
        return own_positions(self.ids_BS.shape[1], *self.cut, self.ids_BS.device)

    def own(self, whole_BS: Tensor) -> Tensor:
        """This rank's part of the sequences."""
        return whole_BS if self.own_S is None else whole_BS[:, self.own_S]

    @property
    def own_ids_BS(self) -> Tensor:
        return self.own(self.ids_BS)

    @functools.cached_property
    def rows_T(self) -> Tensor:
        """Supervised rows s * B + b of hidden states [S, B, H], ascending; s counts within this rank's part."""
        return (self.own(self.labels_BS).T.flatten() != MASKED).nonzero()[:, 0]

    @functools.cached_property
    def whole_rows_T(self) -> Tensor:
        """The same rows with s in the whole sequence."""
        if self.own_S is None:
            return self.rows_T
        batch = len(self.ids_BS)
        return self.own_S[self.rows_T // batch] * batch + self.rows_T % batch

    @functools.cached_property
    def labels_T(self) -> Tensor:
        return self.own(self.labels_BS).T.flatten()[self.rows_T]

    @functools.cached_property
    def teachers_T(self) -> Tensor:
        """The teacher of each supervised row, where there are several."""
        teachers_BS = torch.full_like(self.ids_BS, -1)
        for (row, start, stop), teacher in zip(self.parts(), self.teachers, strict=True):
            teachers_BS[row, start:stop] = teacher
        return self.own(teachers_BS).T.flatten()[self.rows_T]

    @functools.cached_property
    def position_ids_BS(self) -> Tensor:
        """Positions; they start again at every segment."""
        batch, length = self.ids_BS.shape
        if self.segments is None:
            return self.own(torch.arange(length, device=self.ids_BS.device).expand(batch, length))
        return torch.cat([torch.arange(n, device=self.ids_BS.device) for n in self.segments])[None]

    @functools.cached_property
    def packed(self) -> PackedSeqParams | None:
        """Megatron's description of the segments, None without."""
        if self.segments is None:
            return None
        ends = torch.tensor([0, *itertools.accumulate(self.segments)], dtype=torch.int32, device=self.ids_BS.device)
        longest = max(self.segments)
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )

    def to(self, device) -> "MicroBatch":
        return dataclasses.replace(self, ids_BS=self.ids_BS.to(device), labels_BS=self.labels_BS.to(device))

    def parts(self) -> list[tuple[int, int, int]]:
        """(row, start, stop) of every sample."""
        batch, length = self.ids_BS.shape
        return list(self.samples) if self.samples is not None else [(row, 0, length) for row in range(batch)]


def build_micro_batch(
    loaded: dict, *, packed: bool, cut: tuple[int, int] = (0, 1), teachers: list[int] | None = None
) -> MicroBatch:
    """A micro-batch from what `megakd.data.dataset.load_batch` returns.

    Args:
        packed: lay the rows out as one, cut into segments; the same for all micro-batches of a step, and needed when
            a row may hold several samples.
        cut: see MicroBatch.
        teachers: the number of each row's teacher, where there are several.
    """
    ids_BS, labels_BS = loaded["ids"], loaded["labels"]
    length, samples, segments, of_samples = ids_BS.shape[1], [], [], []
    assert packed or all(len(row) == 1 for row in loaded["segments"]), "rows of several samples must be packed"
    for row, (lengths, used) in enumerate(zip(loaded["segments"], loaded["lengths"], strict=True)):
        ends = list(itertools.accumulate(lengths))
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            shift = row * length if packed else 0
            samples.append((0 if packed else row, shift + start, shift + min(stop, used)))
        segments += lengths
        if teachers is not None:
            of_samples += [teachers[row] if (labels_BS[row] != MASKED).any() else -1] * len(lengths)
    how = tuple(samples), cut, None if teachers is None else tuple(of_samples)
    if not packed:
        return MicroBatch(ids_BS, labels_BS, None, *how)
    return MicroBatch(ids_BS.reshape(1, -1), labels_BS.reshape(1, -1), tuple(segments), *how)


def forward(gpt, micro_batch: MicroBatch) -> Tensor:
    """Hidden states [S, B, H] on the last stage, the next stage's input on the others; a trace shows it by name."""
    with torch.profiler.record_function("forward" if torch.is_grad_enabled() else "forward only"):
        return gpt(micro_batch.own_ids_BS, micro_batch.position_ids_BS, None, packed_seq_params=micro_batch.packed)
