"""Importances of a checkpoint's parts over the samples that training with a config would read first."""

import logging

import torch
from torch import Tensor

from megakd.assembly.architectures import check_padding
from megakd.assembly.data import describe_data, open_both
from megakd.assembly.models import build_model
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Config
from megakd.data.blend import indices_of_step
from megakd.data.dataset import batch_length, load_batch
from megakd.data.order import split_batch
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.models.forward_only import forward_only
from megakd.models.gpt import padded_vocab_size
from megakd.models.groups import build_groups, destroy_groups
from megakd.models.micro_batch import MicroBatch, build_micro_batch
from megakd.progress import progress_bar
from megakd.pruning.importance import Importance
from megakd.ranks import Ranks

LOG = logging.getLogger("megakd")


def calibrate(
    config: Config, teacher: Checkpoint, tokenizer: Tokenizer, keys: set[str], ranks: Ranks
) -> tuple[dict[str, Tensor], dict]:
    """Run the model over the calibration data. Nothing of it is in memory afterwards.

    Args:
        config: at the layout that the model runs at.
        keys: of the prune section: which importances are wanted.
    Returns:
        (importances by key, what they were taken over); on every rank.
    Raises:
        ConfigError, DataError: before any weight is read; the data are missing, empty, or of another tokenizer.
    Collectives: those of building, loading and running the model.
    """
    padded_size = padded_vocab_size(teacher.model.vocab_size)
    check_padding(padded_size, config.parallel.tp)
    samples = open_samples(config, tokenizer)
    number = min(config.prune.samples, len(samples))
    parallel, train = config.parallel, config.teacher_train
    groups = build_groups(parallel.tp, parallel.pp, config.run.seed, ep=parallel.ep)
    gpt = build_model(
        teacher.model, teacher, parallel, train, groups,
        vocab_size=teacher.model.vocab_size, padded_size=padded_size, device=ranks.device, name="teacher", local=True,
        pipeline=config.teacher.pipeline, sharded=parallel.shards("teacher"),
    )  # fmt: skip
    gpt.requires_grad_(False).eval()
    LOG.info("importances over %s samples of %s", f"{number:,}", config.data.train)
    bar = progress_bar(number, "calibrating", shown=ranks.is_main and config.log.progress)
    with Importance(gpt, keys) as importance, bar:
        for micro_batches, done in batches(config, samples, number, groups, ranks.device):
            importance.begin(micro_batches)
            forward_only(gpt, micro_batches, lambda *_: None, groups)
            bar.update(done)
    found = importance.result()
    destroy_groups()
    told = describe_data(config, samples, None) | {"samples": number, "precision": train.precision}
    del told["validation"]
    return found, told


def open_samples(config: Config, tokenizer: Tokenizer):
    """The training data, sample by sample: what fills packs up is none of theirs."""
    data = config.data.model_copy(update={"packing": False, "validation": None})
    return open_both(config.model_copy(update={"data": data, "rollouts": None}), tokenizer)[0]


def batches(config: Config, samples, number: int, groups, device: torch.device):
    """Yields (this data-parallel rank's micro-batches, samples of all ranks in them); all ranks have as many of them.

    The last are filled up with empty rows.
    """
    dp, size = groups.dp, config.train.micro_batch_size
    in_flight = 1 if groups.pp.size() == 1 else 4 * groups.pp.size()
    turn = in_flight * size * dp.size()
    places = indices_of_step(samples, config.run.seed, 0, number)
    for first in range(0, number, turn):
        some = places[first : first + turn]
        length = batch_length(samples, some, config.parallel.sequence_multiple)
        filled = some + [None] * (turn - len(some))
        yield (
            [micro_batch(samples, part, length).to(device) for part in split_batch(filled, dp.rank(), dp.size(), size)],
            len(some),
        )


def micro_batch(samples, places: list, length: int) -> MicroBatch:
    return build_micro_batch(load_batch(samples, places, length), packed=False)
