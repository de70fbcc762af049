"""The data of a run: opened, counted, and described so that a recording and a training can be compared."""

import logging
import math
import os
from collections.abc import Iterator

import torch.distributed as dist

from megakd.config import Config
from megakd.data.blend import BlendedDataset
from megakd.data.sources import open_data
from megakd.data.token_files.reader import TokenFile
from megakd.data.token_files.verification import chunks_to_compare, compare, size_of
from megakd.progress import progress_bar
from megakd.ranks import from_rank_0, read_launch

LOG = logging.getLogger("megakd")


def open_both(config: Config, tokenizer) -> tuple:
    """Training data (None where the student writes it) and validation data (None without).

    What is not tokenized yet is, by rank 0 while the others wait.

    Raises:
        DataError: see `open_data`; or a file is not what was written.
    Collectives: one broadcast; `run.timeout_seconds` must be enough for rank 0 (or use `megakd prepare` before).
    """

    def open_all(build: bool) -> tuple:
        train = None if config.reads_no_data else config.data.train
        sources = ((train, config.run.seed), (config.data.validation, None))
        return tuple(
            None if source is None else open_data(config.data, source, tokenizer, seed, build=build, progress=shown)
            for source, seed in sources
        )

    shown = config.log.progress and dist.get_rank() == 0
    from_rank_0(lambda: open_all(build=True) and None)
    opened = open_all(build=False)
    verify_data(config, [file for data in opened if data is not None for file in token_files(data)], shown)
    return opened


def verify_data(config: Config, files: list[TokenFile], shown: bool) -> None:
    """Compare token files with their digests, as far as data.verify says; the ranks of each machine share the work.

    Raises:
        DataError: on the rank that finds a difference.
    """
    for file in files:
        if file.info.parts is None and config.data.verify != "never":
            LOG.info("%s was written without digests: nothing to compare (`megakd prepare` writes them)", file.prefix)
    launch = read_launch(os.environ)
    shares = launch.local_world_size or 1  # of each machine, which may have copies of its own
    chunks = chunks_to_compare(files, config.data.verify, launch.local_rank % shares, shares)
    with progress_bar(sum(map(size_of, chunks)), "comparing data", unit="B", shown=shown) as bar:
        compare(chunks, bar.update)


def token_files(data) -> Iterator[TokenFile]:
    """The token files that a data set reads; of a blend, its parts' in order."""
    if isinstance(data, BlendedDataset):
        for part in data.parts:
            yield from token_files(part)
    else:
        yield data.file


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
    return "+".join(file.info.content for file in token_files(data))
