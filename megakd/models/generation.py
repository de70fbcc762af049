"""Greedy completion by running the whole prefix again for every token: for a look at a model, not for serving it.

Legend: S sequence.
"""

import torch
import torch.distributed as dist

from megakd.kernels.predictions import predict
from megakd.kernels.vocab import MASKED
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.micro_batch import MicroBatch


def complete(gpt: GPT, ids: list[int], new_tokens: int, eos_id: int | None, groups, device) -> list[int]:
    """The most likely next tokens, one after the other.

    Args:
        ids: the prompt, at least one token; with the new tokens at most max_sequence_length.
        new_tokens: how many to add; fewer when eos_id comes up, which is left out.
    Returns:
        the new ids, equal on all ranks.
    Collectives: those of the model, and one broadcast of the id over pipeline stages.
    """
    new = []
    for _ in range(new_tokens):
        token = next_token(gpt, ids + new, groups, device)
        if token == eos_id:
            break
        new.append(token)
    return new


def next_token(gpt: GPT, ids: list[int], groups, device) -> int:
    padding = -len(ids) % groups.tp.size() if gpt.config.sequence_parallel else 0
    ids_1S = torch.tensor([ids + [0] * padding], device=device)
    last_row = torch.tensor([len(ids) - 1], device=device)
    no_label = torch.tensor([MASKED], device=device)

    def keep(hidden_SBH, micro_batch):
        return predict(gpt.logits(hidden_SBH, last_row), no_label, gpt.shard).id_T

    kept = forward_only(gpt, [MicroBatch(ids_1S, torch.full_like(ids_1S, MASKED))], keep, groups)
    token = kept[0] if kept else torch.zeros_like(last_row)
    if groups.pp.size() > 1:
        dist.broadcast(token, group=groups.pp, group_src=groups.pp.size() - 1)
    return int(token)
