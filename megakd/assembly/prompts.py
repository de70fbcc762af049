"""The prompts of a run whose student writes: read and tokenized once, the same on every rank."""

import logging

from megakd.config import Config
from megakd.data.prompts import Prompt, Prompts, detect_prompts
from megakd.data.sources import choose_format, data_files
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import ConfigError
from megakd.ranks import from_rank_0

LOG = logging.getLogger("megakd")


def open_prompts(
    config: Config, path: str, name: str, tokenizer: Tokenizer, max_new_tokens: int, limit: int | None = None
) -> dict[int, Prompt]:
    """The prompts of a file by their numbers in it.

    Args:
        path: file, folder or pattern.
        name: of the records' format; templates are those of the data section.
        max_new_tokens: for which data.sequence_length leaves room behind a prompt.
        limit: records that are read; None: all.
    Raises:
        DataError: there is none, or some cannot be used (one that is too long, too) and data.on_error is `raise`.
    Collectives: one broadcast of the prompts.
    """
    most = config.data.sequence_length + 1 - max_new_tokens

    def read() -> dict[int, Prompt]:
        files = tuple(data_files(path))
        known = detect_prompts(files, config.data.columns) if name == "auto" else name
        form = choose_format(config.data.model_copy(update={"format": known}), files)
        found, problems = Prompts(files, form, tokenizer, limit).read(config.data.on_error, most)
        if problems.count:
            LOG.warning("%s: left out %d prompts that cannot be used:\n%s", path, problems.count, problems)
        return found

    return from_rank_0(read)


def open_rollout_prompts(config: Config, tokenizer: Tokenizer) -> dict[int, Prompt]:
    """Those of the rollouts section.

    Raises:
        ConfigError: nothing could end a completion but its length.
        DataError: as `open_prompts`.
    Collectives: one broadcast of the prompts.
    """
    section = config.rollouts
    if tokenizer.eos_id is None and not section.stop and not section.stop_tokens:
        raise ConfigError(
            f"rollouts: the tokenizer {tokenizer.files[0]} has no eos, so nothing that the student writes would end",
            hint="name what ends a completion: rollouts.stop_tokens=['<|end|>'], or rollouts.stop=[TEXT]",
        )
    found = open_prompts(config, section.prompts, section.format, tokenizer, section.max_new_tokens)
    size, mine = config.train.global_batch_size, section.samples(config.train.global_batch_size)
    LOG.info("%s: %s prompts; the student writes %d of a batch's %d samples", section.prompts, f"{len(found):,}",
             mine, size)  # fmt: skip
    return found
