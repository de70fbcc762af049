"""A frozen teacher over micro-batches, and the cache rows of what it says.

Legend: T supervised tokens of a micro-batch, B samples, S ids of a sample, H hidden, K entries, X temperatures.
"""

import numpy as np
from torch import Tensor

from megakd.cache import Row
from megakd.cache.samples import read_sample
from megakd.models.entries import Entries, Recipe, choose_entries
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch


class Recorder:
    """Runs a frozen teacher over micro-batches and makes cache rows of what it says.

    Args:
        gpt: the teacher; its parameters are frozen here.
        recipe: which entries are kept.
        groups: the run's process groups.
    """

    def __init__(self, gpt: GPT, recipe: Recipe, groups):
        self.gpt, self.recipe, self.groups = gpt.requires_grad_(False).eval(), recipe, groups

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of its model that is given the rows."""
        return is_last_stage(self.groups) and self.groups.tp.rank() == 0

    def rows(self, micro_batches: list[MicroBatch]) -> list[Row]:
        """The rows of all samples with supervised positions, in order, on the rank that writes; [] on the others."""
        said = forward_only(self.gpt, micro_batches, self._keep, self.groups)
        if not self.writes:
            return []
        pairs = zip(said, micro_batches, strict=True)
        return [row for entries, micro_batch in pairs for row in split(entries, micro_batch)]

    def _keep(self, hidden_SBH: Tensor, micro_batch: MicroBatch) -> Entries:
        logits_TW = self.gpt.logits(hidden_SBH, micro_batch.rows_T)
        entries = choose_entries(logits_TW, micro_batch.labels_T, self.gpt.shard, self.recipe)
        return Entries(*(part.cpu() for part in entries))


def split(entries: Entries, micro_batch: MicroBatch) -> list[Row]:
    """The rows of a micro-batch's samples; a sample without supervised positions has none."""
    ids_BS, labels_BS = micro_batch.ids_BS.cpu().numpy(), micro_batch.labels_BS.cpu().numpy()
    rows_T = micro_batch.rows_T.cpu().numpy()
    place_T, row_T = np.divmod(rows_T, len(ids_BS))
    ids_TK, logprobs_TK, log_tail_XT, label_logprob_T, top_id_T = (part.numpy() for part in entries)
    rows = []
    for b, start, stop in micro_batch.parts():
        mine_T = np.flatnonzero((row_T == b) & (place_T >= start) & (place_T < stop))
        if not len(mine_T):
            continue
        sample = read_sample(ids_BS[b, start:stop], labels_BS[b, start:stop])
        used_TK = ids_TK[mine_T] >= 0
        rows.append(
            Row(
                key=sample.key,
                mask_S=sample.mask_S,
                last_label=sample.last_label,
                counts_T=used_TK.sum(1),
                ids_N=ids_TK[mine_T][used_TK],
                logprobs_N=logprobs_TK[mine_T][used_TK],
                log_tail_XT=log_tail_XT[:, mine_T],
                label_logprob_T=label_logprob_T[mine_T],
                top_id_T=top_id_T[mine_T],
            )
        )
    return rows
