"""The teacher's output layer into a cache of hidden states, from the ranks that share it.

Legend: W vocabulary columns of a rank, H hidden, B rows of a block.
"""

import pathlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.cache import Header, publish_head
from megakd.errors import CacheError
from megakd.models.gpt import GPT
from megakd.models.groups import is_last_stage
from megakd.models.sharding import gather_head, let_go
from megakd.recording.recorder import Recorder

BLOCK_BYTES = 16 << 20


def record_output_layer(folder: pathlib.Path, header: Header, recorder: Recorder, groups) -> None:
    """Publish it, by the first rank that writes.

    Collectives: a broadcast of every block of it over that rank's tp; where weights are sharded, their gathering.
    """
    gpt = recorder.gpt
    gather_head(gpt)
    if is_last_stage(groups) and groups.dp.rank() == 0:
        blocks = head_blocks(gpt, groups.tp)
        if recorder.writes:
            publish_head(folder, blocks, header, gpt.softcap)
        else:
            for _ in blocks:
                pass
    let_go(gpt)


@torch.no_grad()
def head_blocks(gpt: GPT, tp) -> Iterator[Tensor]:
    """The rows of a model's output layer without padding, in order and in blocks, on the CPU of every rank of tp.

    Raises:
        CacheError: some are not finite; on all of these ranks.
    Collectives: a broadcast of each block.
    """
    weight_WH, width = gpt.head_weight, gpt.shard.stop - gpt.shard.start
    rows = max(BLOCK_BYTES // gpt.state_bytes, 1)
    for rank in range(tp.size()):
        real = max(min(width, gpt.shard.size - rank * width), 0)
        for first in range(0, real, rows):
            block_BH = weight_WH[first : min(first + rows, real)].clone()
            dist.broadcast(block_BH, group=tp, group_src=rank)
            if not block_BH.isfinite().all():
                raise CacheError(
                    "the teacher's output layer holds NaN or infinity", hint="look at the teacher's weights"
                )
            yield block_BH.cpu()
