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
from megakd.teachers.mixed import MixedLesson
from megakd.teachers.online import OnlineTeacher
from megakd.teachers.whole_lesson import WholeLesson

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
        whole = WholeLesson(hidden_TH, self.gpt, self.top_k, self.temperature, self.budget_bytes)
        block = self.gpt.block_tokens(self.budget_bytes)
        return draw_lesson(whole, micro_batch, self.draws, self.seed, self.step, self.temperature, block)


def draw_lesson(
    lesson: WholeLesson | MixedLesson,
    micro_batch: MicroBatch,
    draws: int,
    seed: int,
    step: int,
    temperature: float,
    block_tokens: int,
) -> Lesson:
    """Draws from whole distributions.

    Args:
        lesson: about the micro-batch, with the teacher's logits.
        draws, seed, step: N of a token, of the run, and as of `seed_of`.
        block_tokens: whose logits exist at one time.
    """
    device, shard = micro_batch.labels_T.device, lesson.head.shard
    lessons, places = [], []
    for sample, mine_T in find_samples(micro_batch):
        generator = torch.Generator(device).manual_seed(seed_of(sample, seed, step))
        for part_T in torch.from_numpy(mine_T).to(device).split(block_tokens):
            given = lesson.rows(part_T).logits(), micro_batch.labels_T[part_T], draws, shard, generator, temperature
            targets, said = sample_and_predict(*given)
            lessons.append(Lesson(targets, said.label_logprob_T, said.id_T))
            places.append(part_T)
    if not lessons:
        return nothing_drawn(draws, temperature, device)
    return join(lessons).rows(torch.cat(places).argsort())


def nothing_drawn(draws: int, temperature: float, device) -> Lesson:
    """Of a micro-batch without supervised tokens."""
    ids_TK, none_T = torch.empty((0, draws), dtype=torch.int64, device=device), torch.empty(0, device=device)
    targets = TeacherTargets(ids_TK, torch.empty((0, draws), device=device), none_T, temperature, none_T)
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
