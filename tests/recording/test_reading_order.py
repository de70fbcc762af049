"""Every sample that a run reads is recorded, and once, blends that repeat a part included."""

import numpy as np
import pytest

from megakd.data.blend import BlendedDataset, indices_of_step
from megakd.data.dataset import TextDataset
from megakd.data.order import batch_indices
from megakd.errors import ConfigError
from megakd.recording.reading_order import Samples, first_readings
from tests.training import small


class Numbers:
    """A data set whose samples are their own index, the same in every epoch."""

    sequence_length = small.SEQUENCE
    counts: dict = {}  # noqa: RUF012

    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def length(self, epoch, index):
        return index + 1

    def sample(self, epoch, index):
        return (self.name, index)


class Text(Numbers, TextDataset):
    """Windows of running text, of which every epoch has others."""


def samples(data, steps, **changes):
    config = small.config(train__steps=steps, train__global_batch_size=8, **changes)
    return Samples(data, Numbers("held out", 4), config), config


def read_by_training(data, config):
    every = indices_of_step(data, config.run.seed, 0, config.train.steps * 8)
    return {data.sample(*place) for place in every}


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize("weights", [None, [0.8, 0.2]])
def test_a_blend_is_recorded_as_far_as_it_is_read_and_no_sample_twice(steps, weights):
    data = BlendedDataset([Numbers("small", 5), Numbers("large", 40)], weights, seed=3)
    recorded, config = samples(data, steps)
    got = [recorded.sample(0, number) for number in range(len(recorded))]
    assert got[:4] == [("held out", index) for index in range(4)]
    assert len(set(got)) == len(got)
    assert set(got[4:]) == read_by_training(data, config)
    assert [recorded.length(0, number) for number in range(len(recorded))] == [index + 1 for _, index in got]


@pytest.mark.parametrize("weights", [None, [0.8, 0.2]])
def test_of_packed_data_every_sample_is_recorded_whatever_its_weight_and_the_steps(weights):
    parts = [Numbers("small", 5), Numbers("large", 40)]
    recorded, _ = samples(BlendedDataset(parts, weights, seed=3), 1, data__packing=True)
    got = [recorded.sample(0, number) for number in range(len(recorded))]
    assert sorted(got[4:]) == sorted((part.name, index) for part in parts for index in range(len(part)))


def test_running_text_is_recorded_as_far_as_it_is_read_packing_or_not():
    text = Text("text", 5)
    recorded, _ = samples(text, 3, data__packing=True)
    got = [recorded.place(number)[1:] for number in range(4, len(recorded))]
    assert got == batch_indices(small.config().run.seed, 0, 24, 5)
    with pytest.raises(ConfigError, match=r"blends running text with samples of their own, and data\.packing"):
        samples(BlendedDataset([text, Numbers("own", 5)], None, seed=3), 3, data__packing=True)


def test_jobs_share_the_samples_by_ranges():
    data = Numbers("data", 50)
    whole, _ = samples(data, 3)
    parts = [samples(data, 3, cache__start=a, cache__end=b)[0] for a, b in ((0, 9), (9, 20), (20, 1000))]
    joined = [part.sample(0, number) for part in parts for number in range(len(part))]
    assert joined == [whole.sample(0, number) for number in range(len(whole))] and len(joined) == 28
    with pytest.raises(ConfigError, match=r"cache\.start = 28, but there are 28 samples \(4 of validation data\)"):
        samples(data, 3, cache__start=28)


def test_running_text_is_never_read_twice():
    assert first_readings(TextDataset.__new__(TextDataset), 1, 10**9) is None
    assert first_readings(Numbers("data", 7), 1, 20).tolist() == np.arange(7).tolist()
