"""The data of a run: opened, counted, and described so that a recording and a training can be compared."""

import math

import torch.distributed as dist

from megakd.config import Config
from megakd.data.blend import BlendedDataset
from megakd.data.sources import open_data
from megakd.ranks import from_rank_0


def open_both(config: Config, tokenizer) -> tuple:
    """Training and validation data (None without); what is not tokenized yet is, by rank 0 while the others wait.

    Collectives: one broadcast; `run.timeout_seconds` must be enough for rank 0 (or use `megakd prepare` before).
    """

    def open_all(build: bool) -> tuple:
        sources = ((config.data.train, config.run.seed), (config.data.validation, None))
        return tuple(
            None if source is None else open_data(config.data, source, tokenizer, seed, build=build, progress=shown)
            for source, seed in sources
        )

    shown = config.log.progress and dist.get_rank() == 0
    from_rank_0(lambda: open_all(build=True) and None)
    return open_all(build=False)


def run_steps(config: Config, train_data) -> int:
    """Optimizer steps of the whole run."""
    train = config.train
    return train.steps or max(math.ceil(train.epochs * len(train_data) / train.global_batch_size), 1)


def describe_data(config: Config, train_data, validation_data) -> dict:
    """What decides which samples a run reads; equal in a recording and a training run that fit each other."""
    return {
        "train": content(train_data),
        "validation": content(validation_data) if validation_data is not None else None,
        "sequence_length": config.data.sequence_length,
        "seed": config.run.seed,
    }


def content(data) -> str:
    """The identity of what a data set reads; of a blend, of its parts in order."""
    if isinstance(data, BlendedDataset):
        return "+".join(content(part) for part in data.parts)
    return data.file.info.content
