"""A live teacher of whose distribution draws are made: those of a sample depend on its content, the step and the seed.

Legend: T supervised tokens of a micro-batch, S sequence, B micro-batch, H hidden, N draws.
"""

import numpy as np
import torch
from torch import Tensor

from megakd.cache.samples import Sample, read_sample
from megakd.kernels.sampling import sample_and_predict
from megakd.models.micro_batch import MicroBatch
from megakd.targets import TeacherTargets
from megakd.teachers.lesson import Lesson, join
from megakd.teachers.online import OnlineTeacher

NEXT_STEP = 0x9E3779B97F4A7C15  # odd: every step has seeds of its own


class SampledTeacher(OnlineTeacher):
    """An online teacher that says what it has drawn.

    Args:
        draws: N of a token.
        seed: of the run.
        others: as of an online teacher.
    """

    def __init__(self, gpt, *, draws: int, seed: int, **others):
        super().__init__(gpt, **others)
        self.draws, self.seed = draws, seed

    def _reduce(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> Lesson:
        hidden_TH = self.gpt.head_input(hidden_SBH, micro_batch.rows_T)
        device, shard, block = hidden_TH.device, self.gpt.shard, self.gpt.block_tokens(self.budget_bytes)
        lessons, places = [], []
        for sample, mine_T in find_samples(micro_batch):
            generator = torch.Generator(device).manual_seed(seed_of(sample, self.seed, self.step))
            for part_T in torch.from_numpy(mine_T).to(device).split(block):
                logits_BW, labels_B = self.gpt.logits_of(hidden_TH[part_T]), micro_batch.labels_T[part_T]
                given = logits_BW, labels_B, self.draws, shard, generator, self.temperature
                targets, said = sample_and_predict(*given)
                lessons.append(Lesson(targets, said.label_logprob_T, said.id_T))
                places.append(part_T)
        if not lessons:
            return self._nothing(device)
        return join(lessons).rows(torch.cat(places).argsort())

    def _nothing(self, device) -> Lesson:
        """Of a micro-batch without supervised tokens."""
        ids_TK, none_T = torch.empty((0, self.draws), dtype=torch.int64, device=device), torch.empty(0, device=device)
        targets = TeacherTargets(ids_TK, torch.empty((0, self.draws), device=device), none_T, self.temperature, none_T)
        return Lesson(targets, none_T, torch.empty(0, dtype=torch.int64, device=device))


def find_samples(micro_batch: MicroBatch) -> list[tuple[Sample, np.ndarray]]:
    """The samples with supervised positions, and which of the T rows are theirs."""
    ids_BS, labels_BS = micro_batch.ids_BS.cpu().numpy(), micro_batch.labels_BS.cpu().numpy()
    place_T, row_T = np.divmod(micro_batch.rows_T.cpu().numpy(), len(ids_BS))
    samples = []
    for b, start, stop in micro_batch.parts():
        mine_T = np.flatnonzero((row_T == b) & (place_T >= start) & (place_T < stop))
        if len(mine_T):
            samples.append((read_sample(ids_BS[b, start:stop], labels_BS[b, start:stop]), mine_T))
    return samples


def seed_of(sample: Sample, seed: int, step: int = 0) -> int:
    """Of a sample's draws, whatever batch and layout it is in.

    Args:
        seed: of the run.
        step: the optimizer step that learns from them; 0 for a recording.
    """
    return ((int.from_bytes(sample.key[:7], "big") ^ seed) + step * NEXT_STEP) % 2**63
