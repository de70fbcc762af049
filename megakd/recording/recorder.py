"""A frozen teacher over micro-batches, and the cache rows of what it says.

Legend: T supervised tokens of a micro-batch, B samples, S ids of a sample, H hidden, K entries, X temperatures.
"""

import numpy as np
import torch
from torch import Tensor

from megakd.cache import HiddenRow, Row
from megakd.cache.samples import Sample
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch
from megakd.teachers.entries import Entries, Recipe, choose_entries, draw_entries
from megakd.teachers.sampled import find_samples, seed_of


class Recorder:
    """Runs a frozen teacher over micro-batches and makes cache rows of what it says.

    Args:
        gpt: the teacher; its parameters are frozen here.
        recipe: which entries are kept.
        groups: the run's process groups.
        seed: of draws; with a sample's content and tp it determines them, whatever the batch and the order.
    """

    def __init__(self, gpt: GPT, recipe: Recipe, groups, seed: int):
        self.gpt, self.recipe, self.groups = gpt.requires_grad_(False).eval(), recipe, groups
        self.seed = seed

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of its model that is given the rows."""
        return is_last_stage(self.groups) and self.groups.tp.rank() == 0

    def rows(self, micro_batches: list[MicroBatch]) -> list[Row]:
        """The rows of all samples with supervised positions, in order, on the rank that writes; [] on the others."""
        kept = forward_only(self.gpt, micro_batches, self._keep, self.groups)
        return [row for rows in kept for row in rows]

    def _keep(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> list[Row]:
        logits_TW, samples = self.gpt.logits(hidden_SBH, micro_batch.rows_T), find_samples(micro_batch)
        if self.recipe.drawn:
            device = logits_TW.device
            groups = [(torch.from_numpy(mine_T).to(device), seed_of(sample, self.seed)) for sample, mine_T in samples]
            entries = draw_entries(logits_TW, micro_batch.labels_T, self.gpt.shard, self.recipe, groups)
        else:
            entries = choose_entries(logits_TW, micro_batch.labels_T, self.gpt.shard, self.recipe)
        return build_rows(entries, samples) if self.writes else []


class HiddenRecorder(Recorder):
    """Keeps what the teacher's output layer is given, which it does not apply."""

    def _keep(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> list[HiddenRow]:
        hidden_TH = self.gpt.head_input(hidden_SBH, micro_batch.rows_T)
        if not hidden_TH.isfinite().all():  # on all ranks of tp alike, which hold the same
            raise ValueError("the teacher's last hidden states hold NaN or infinity")
        if not self.writes:
            return []
        hidden_TH = hidden_TH.cpu()
        return [HiddenRow(*sample, hidden_TH[mine_T]) for sample, mine_T in find_samples(micro_batch)]


def build_rows(entries: Entries, samples: list[tuple[Sample, np.ndarray]]) -> list[Row]:
    """A row for each sample."""
    columns = Entries(*(None if part is None else part.cpu().numpy() for part in entries))
    rows = []
    for sample, mine_T in samples:
        used_TK = columns.ids_TK[mine_T] >= 0
        rows.append(
            Row(
                key=sample.key,
                mask_S=sample.mask_S,
                last_label=sample.last_label,
                counts_T=used_TK.sum(1),
                ids_N=columns.ids_TK[mine_T][used_TK],
                logprobs_N=columns.logprobs_TK[mine_T][used_TK],
                log_tail_XT=columns.log_tail_XT[:, mine_T],
                label_logprob_T=columns.label_logprob_T[mine_T],
                top_id_T=columns.top_id_T[mine_T],
                entropy_T=None if columns.entropy_T is None else columns.entropy_T[mine_T],
            )
        )
    return rows
