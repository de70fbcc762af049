"""The samples that a run reads, in its order and each once: what a recording records."""

import numpy as np

from megakd.assembly.data import describe_data, run_steps
from megakd.config import Config
from megakd.data.blend import BlendedDataset, indices_of_step
from megakd.data.dataset import TextDataset
from megakd.errors import ConfigError


class Samples:
    """Validation data, then training data in training order, as one data set; those of this job's share.

    A sample that training reads again, in a later epoch or as part of a blend, stands there once.

    Args:
        train_data, validation_data: the run's.
        config: the run's.
    """

    def __init__(self, train_data, validation_data, config: Config):
        self.validation_data, self.config = validation_data, config
        self.sequence_length = config.data.sequence_length
        self.validated = 0
        if validation_data is not None:
            self.validated = min(config.eval.samples or len(validation_data), len(validation_data))
        wanted = run_steps(config, train_data) * config.train.global_batch_size
        if config.data.packing and not_all_text(train_data):  # packs may hold any sample of any part
            train_data, wanted = each_part_once(train_data, config.run.seed), len(train_data)
        self.train_data, self.firsts = train_data, first_readings(train_data, config.run.seed, wanted)
        every = self.validated + (wanted if self.firsts is None else len(self.firsts))
        self.start, self.end = config.cache.bounds(every)
        if self.start >= self.end:
            raise ConfigError(
                f"cache.start = {self.start}, but there are {every} samples ({self.validated} of validation data)"
                if config.cache.share is None
                else f"cache.share = {config.cache.share} holds none of {every} samples",
                hint="choose cache.start and cache.end within them, or fewer shares",
            )

    def __len__(self) -> int:
        return self.end - self.start

    def length(self, _, number: int) -> int:
        """Ids of sample `number`."""
        data, epoch, index = self.place(number)
        return data.length(epoch, index)

    def sample(self, _, number: int) -> dict:
        """Sample `number` from cache.start on, as the data set gives it."""
        data, epoch, index = self.place(number)
        return data.sample(epoch, index)

    def place(self, number: int) -> tuple:
        """(data set, epoch, index) of sample `number`."""
        position = self.start + number
        if position < self.validated:
            return self.validation_data, 0, position
        reading = position - self.validated
        if self.firsts is not None:
            reading = int(self.firsts[reading])
        return self.train_data, *indices_of_step(self.train_data, self.config.run.seed, reading, 1)[0]

    def describe(self) -> dict:
        """What is recorded, for the header; a miss in training names what differs."""
        return describe_data(self.config, self.train_data, self.validation_data) | {
            "validation_samples": self.validated, "start": self.start, "end": self.end,
        }  # fmt: skip


def not_all_text(data) -> bool:
    """Whether packing applies to a data set; running text is never packed.

    Raises:
        ConfigError: it applies to some of its parts only, and which windows of the others are read cannot be told.
    """
    text = [isinstance(part, TextDataset) for part in parts_of(data)]
    if any(text) and not all(text):
        raise ConfigError(
            "data.train blends running text with samples of their own, and data.packing is true: the windows of text "
            "that training reads depend on the packs, which a recording does not make",
            hint="record and train with data.packing=false",
        )
    return not all(text)


def each_part_once(data, seed: int):
    """A blend without its weights, so that an epoch holds every sample of every part."""
    return BlendedDataset(data.parts, None, seed) if isinstance(data, BlendedDataset) else data


def parts_of(data) -> list:
    return data.parts if isinstance(data, BlendedDataset) else [data]


def first_readings(data, seed: int, readings: int) -> np.ndarray | None:
    """Which of a run's readings of a data set are the first of their sample; None when no sample is read twice.

    Windows of running text differ from epoch to epoch, samples of their own do not.
    """
    parts = parts_of(data)
    if all(isinstance(part, TextDataset) for part in parts):
        return None
    if not isinstance(data, BlendedDataset):
        return np.arange(min(readings, len(data)))  # an epoch has each sample once
    seen, firsts = set(), []
    for reading, (epoch, index) in enumerate(indices_of_step(data, seed, 0, readings)):
        part, epoch, index = data.locate(epoch, index)
        sample = (part, epoch if isinstance(parts[part], TextDataset) else 0, index)
        if sample not in seen:
            seen.add(sample)
            firsts.append(reading)
    return np.array(firsts, np.int64)
