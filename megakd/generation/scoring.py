"""How likely a model finds given continuations.

Legend: B sequences, T continuation tokens of all of them.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megakd.kernels.predictions import predict
from megakd.kernels.vocab import MASKED
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch


def score(
    gpt: GPT, groups, device, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """For each (context, continuation): the continuation's log-probability (nats), and whether it is the greedy one.

    Args:
        gpt: this rank's part of a model, without sequence parallelism.
        pairs: ids, the context at least one, the continuation any number; the same on all ranks of the model.
        batch_size: sequences of one forward pass; those of like length go together.
    Collectives: those of the model, 32 B a token; with pipeline stages one broadcast of 16 B a sequence.
    """
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        for i, scored in zip(batch, _score_batch(gpt, groups, device, [pairs[i] for i in batch]), strict=True):
            found[i] = scored
    return found


def _score_batch(gpt: GPT, groups, device, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    longest = max(max(len(context) + len(continuation) for context, continuation in pairs) - 1, 1)
    ids_BS = torch.zeros(len(pairs), longest, dtype=torch.int64)
    labels_BS = torch.full_like(ids_BS, MASKED)
    for row, (context, continuation) in enumerate(pairs):
        whole = [*context, *continuation]
        ids_BS[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        labels_BS[row, len(context) - 1 : len(whole) - 1] = torch.tensor(continuation, dtype=torch.int64)
    micro_batch = MicroBatch(ids_BS.to(device), labels_BS.to(device))

    def keep(hidden_SBH, micro_batch: MicroBatch):
        labels_T, row_T = micro_batch.labels_T, micro_batch.rows_T % len(pairs)
        said = predict(gpt.logits(hidden_SBH, micro_batch.rows_T), labels_T, gpt.shard)
        table_2B = torch.zeros(2, len(pairs), dtype=torch.float64, device=device)
        return table_2B.index_add_(1, row_T, torch.stack([said.label_logprob_T, (said.id_T != labels_T)]).double())

    kept = forward_only(gpt, [micro_batch], keep, groups)
    table_2B = kept[0] if is_last_stage(groups) else torch.zeros(2, len(pairs), dtype=torch.float64, device=device)
    if groups.pp.size() > 1:
        dist.broadcast(table_2B, group=groups.pp, group_src=groups.pp.size() - 1)
    return [(logprob, misses == 0) for logprob, misses in zip(*table_2B.tolist(), strict=True)]
