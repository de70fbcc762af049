"""A teacher whose tensor parallel ranks are those of several student replicas: its head, and whose tokens it reads.

Its layers are cut over more ranks than the student's. Its head is not: each student replica has all of it, cut as the
student's own, so that what is said about a token is made where it is compared, of the same columns, and nothing but ids
goes between replicas.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.kernels import VocabShard
from megakd.kernels.vocab import MASKED
from megakd.models.gpt import GPT
from megakd.models.groups import WiderGroups
from megakd.models.micro_batch import MicroBatch


@torch.no_grad()
def take_head(gpt: GPT, wider: WiderGroups, groups) -> None:
    """Replace a teacher's head by the columns that this rank has of the student's.

    Its forward then gives hidden states as they are before they are cut along the sequence: one replica alone runs the
    head on them.

    Args:
        gpt: with weights, whose groups are `wider.groups`.
        groups: the student's.
    Collectives: broadcasts of the head's parts over the teacher's tensor parallel ranks.
    """
    tp, theirs = groups.tp, wider.groups.tp
    if gpt.post_process:
        own_WH, each = gpt.head_weight.detach(), theirs.size() // tp.size()
        first, parts = tp.rank() * each, []
        for rank in range(theirs.size()):
            part_WH = own_WH.clone() if rank == theirs.rank() else torch.empty_like(own_WH)
            dist.broadcast(part_WH, group=theirs, group_src=rank)
            if first <= rank < first + each:
                parts.append(part_WH)
        head = torch.nn.Parameter(torch.cat(parts), requires_grad=False)
        head.tensor_model_parallel, head.partition_dim, head.partition_stride = True, 0, 1
        head.shared = gpt.share_embeddings_and_output_weights or wider.sharing.rank() > 0  # counted elsewhere
        gpt.output_layer.weight, gpt.share_embeddings_and_output_weights = head, False
    gpt.whole_output = True
    width = (gpt.shard.stop - gpt.shard.start) * theirs.size() // tp.size()
    start = tp.rank() * width
    gpt.shard = VocabShard(start, start + width, gpt.shard.size, tp if tp.size() > 1 else None)


def of_all_students(micro_batches: list[MicroBatch], sharing: dist.ProcessGroup) -> list[MicroBatch]:
    """The micro-batches of every student replica that shares the teacher, in one order on all of its ranks.

    Args:
        micro_batches: this replica's; as many, and of the same shape, as the others'.
    Returns:
        those, the same objects, among the others'; of these nothing but what a forward needs.
    Collectives: an all-gather of 4 bytes a position, 8 of packed rows.
    """
    packed = micro_batches[0].segments is not None
    sent_NMBS = torch.stack(
        [torch.stack([m.ids_BS, m.position_ids_BS] if packed else [m.ids_BS]) for m in micro_batches], 1
    ).int()
    everyones = [torch.empty_like(sent_NMBS) for _ in range(sharing.size())]
    dist.all_gather(everyones, sent_NMBS, group=sharing)
    everyones[sharing.rank()] = None
    return [
        micro_batch
        for theirs_NMBS in everyones
        for micro_batch in (micro_batches if theirs_NMBS is None else map(without_labels, theirs_NMBS.unbind(1)))
    ]


def without_labels(sent_NBS: Tensor) -> MicroBatch:
    """A micro-batch of another replica: its ids, and where rows are packed the positions."""
    ids_BS = sent_NBS[0].long()
    segments = None
    if len(sent_NBS) > 1:
        starts = (sent_NBS[1].flatten() == 0).nonzero().flatten()
        segments = tuple(torch.cat([starts, starts.new_tensor([ids_BS.numel()])]).diff().tolist())
    return MicroBatch(ids_BS, torch.full_like(ids_BS, MASKED), segments)
