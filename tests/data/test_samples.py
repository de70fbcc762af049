"""Samples of their own: labels shifted and masked, cut and dropped with counts, packed without seeing each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.blend import BlendedDataset, indices_of_step
from megakd.data.dataset import TextDataset, batch_length, load_batch
from megakd.data.order import batch_indices
from megakd.data.samples import PackedDataset, SampleDataset
from megakd.data.token_files.layout import NEVER, part
from megakd.data.token_files.reader import TokenFile
from megakd.data.token_files.writer import TokenFileWriter
from megakd.errors import DataError
from tests.data.test_token_files import write

X = -100
SAMPLES = [  # (ids, mask)
    ([10, 11, 12, 13], [0, 0, 1, 1]),
    ([20, 21], [1, 1]),
    ([30, 31, 32, 33, 34, 35], [0, 0, 0, 0, 1, 1]),
    ([40, 41, 42], [1, 0, 0]),  # nothing predicts its only supervised token
    ([50, 51, 52, 53, 54], [0, 1, 0, 0, 1]),
]


def write_samples(prefix, samples=SAMPLES, skipped=0):
    with TokenFileWriter(
        prefix, tokenizer_fingerprint="aa" * 32, vocab_size=97, eos_appended=False, masked=True
    ) as writer:
        for ids, mask in samples:
            writer.add(ids, mask)
        writer.skipped = skipped
    return prefix


def test_mask_file_by_hand(tmp_path):
    prefix = write_samples(tmp_path / "x", SAMPLES[:2] + SAMPLES[3:4])
    firsts = np.array([2, 1, NEVER], np.int32).tobytes()
    assert part(prefix, ".mask").read_bytes() == bytes([0, 0, 1, 1, 1, 1, 1, 0, 0]) + firsts
    info = TokenFile(prefix).info
    assert (info.masked, info.tokens, info.supervised) == (True, 9, 5)


def test_first_supervised_places_for_random_masks(tmp_path):
    rng = np.random.default_rng(3)
    samples = [([1] * n, rng.integers(0, 5, n) == 0) for n in rng.integers(1, 9, 200)]
    with TokenFileWriter(
        tmp_path / "x", tokenizer_fingerprint="a", vocab_size=9, eos_appended=False, masked=True
    ) as writer:
        for start in range(0, 200, 23):
            part_ = samples[start : start + 23]
            lengths = [len(ids) for ids, _ in part_]
            writer.add_many([i for ids, _ in part_ for i in ids], lengths, np.concatenate([mask for _, mask in part_]))
    expected = [next((j for j in range(1, len(mask)) if mask[j]), NEVER) for _, mask in samples]
    assert TokenFile(tmp_path / "x").firsts.tolist() == expected


def test_labels_by_hand(tmp_path):
    data = SampleDataset(write_samples(tmp_path / "x", skipped=3), 9)
    rows = [data.sample(0, index) for index in range(len(data))]
    assert [(row["ids"].tolist(), row["labels"].tolist(), row["segments"]) for row in rows] == [
        ([10, 11, 12], [X, 12, 13], [3]),
        ([20], [21], [1]),
        ([30, 31, 32, 33, 34], [X, X, X, 34, 35], [5]),
        ([50, 51, 52, 53], [51, X, X, 54], [4]),
    ]
    assert data.counts == {"samples": 4, "truncated": 0, "dropped": 1, "skipped": 3}


def test_cut_samples_and_dropped_answers(tmp_path):
    """Of sequence length 3: the third sample's answer starts at token 4 and is gone; the fifth keeps one label."""
    data = SampleDataset(write_samples(tmp_path / "x"), 3)
    rows = [(row["ids"].tolist(), row["labels"].tolist()) for row in (data.sample(0, i) for i in range(len(data)))]
    assert rows == [([10, 11, 12], [X, 12, 13]), ([20], [21]), ([50, 51, 52], [51, X, X])]
    assert data.counts == {"samples": 3, "truncated": 1, "dropped": 2, "skipped": 0}
    assert len(SampleDataset(tmp_path / "x", 4)) == 4  # exactly reaches the third sample's first supervised token


def test_no_sample_left_is_an_error(tmp_path):
    prefix = write_samples(tmp_path / "x", [SAMPLES[2]])
    with pytest.raises(DataError, match=r"none of the 1 samples .* in its first 3 tokens"):
        SampleDataset(prefix, 2)


def test_batches_are_filled_up_and_as_long_as_they_must_be(tmp_path):
    data = SampleDataset(write_samples(tmp_path / "x"), 12)
    indices = [(0, 1), (0, 0), None]
    assert batch_length(data, indices) == 3 and batch_length(data, indices, 2) == 4
    assert batch_length(data, [None]) == 1
    batch = load_batch(data, indices, batch_length(data, indices, 4))
    assert batch["ids"].tolist() == [[20, 0, 0, 0], [10, 11, 12, 0], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[21, X, X, X], [X, 12, 13, X], [X, X, X, X]]
    assert batch["segments"] == [[4]] * 3 and batch["lengths"] == [1, 3, 0]
    with pytest.raises(ValueError, match="12 is not a multiple of 5"):
        batch_length(data, indices, 5)


def test_packs_by_hand(tmp_path):
    """Lengths 3, 1, 5, 4 in sequences of 8: [3, 5] and [1, 4]; the pads belong to the last segment."""
    packed = PackedDataset(SampleDataset(write_samples(tmp_path / "x"), 8), seed=1)
    batch = load_batch(packed, [(0, 0), (0, 1)])
    assert batch["ids"].tolist() == [[10, 11, 12, 30, 31, 32, 33, 34], [20, 50, 51, 52, 53, 0, 0, 0]]
    assert batch["labels"].tolist() == [[X, 12, 13, X, X, X, 34, 35], [21, 51, X, X, 54, X, X, X]]
    assert batch["segments"] == [[3, 5], [1, 7]] and batch["lengths"] == [8, 5]
    assert packed.counts["packs"] == 2 and packed.fill == 13 / 16
    assert [packed.length(0, index) for index in (0, 1)] == [8, 5]


def test_packing_keeps_every_label_of_every_sample(tmp_path):
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 30, 300)
    samples = [(rng.integers(0, 97, n).tolist(), (rng.random(n) < 0.4).tolist()) for n in lengths]
    data = SampleDataset(write_samples(tmp_path / "x", samples), 31)
    packed = PackedDataset(data, seed=5)
    rows = []
    for index in range(len(packed)):
        pack = packed.sample(0, index)
        assert len(pack["ids"]) == packed.length(0, index) <= 31
        cuts = np.cumsum(pack["segments"])[:-1]
        rows += zip(*(map(tuple, np.split(pack[name], cuts)) for name in ("ids", "labels")), strict=True)
    alone = [tuple(tuple(data.sample(0, index)[name]) for name in ("ids", "labels")) for index in range(len(data))]
    assert sorted(rows) == sorted(alone)


def test_a_damaged_mask_is_named(tmp_path):
    prefix = write_samples(tmp_path / "x")
    content = part(prefix, ".mask").read_bytes()
    part(prefix, ".mask").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"x\.mask is damaged: it has 39 bytes, 40 were written"):
        TokenFile(prefix)
    part(prefix, ".mask").unlink()
    with pytest.raises(DataError, match=r"x\.mask is damaged: it is missing"):
        TokenFile(prefix)


class Numbers:
    """A dataset whose samples say where they come from."""

    sequence_length = 1

    def __init__(self, name, size):
        self.name, self.size = name, size
        self.counts = {"samples": size}

    def __len__(self):
        return self.size

    def sample(self, epoch, index):
        return (self.name, epoch, index)


def test_a_blend_keeps_its_proportions_at_every_point():
    """Of the samples in the order in which a run reads them, in batches that end anywhere in an epoch."""
    blend = BlendedDataset([Numbers("a", 7), Numbers("b", 900), Numbers("c", 40)], [0.5, 0.2, 0.3], seed=1)
    drawn = [blend.sample(*place) for step in range(1092) for place in indices_of_step(blend, 1, step, 13)]
    assert len(blend) == 947 and blend.counts == {"samples": 947} and len(drawn) > 14 * 947
    shares = np.array([[name == part for part in "abc"] for name, _, _ in drawn]).cumsum(0)
    steps = np.arange(1, len(drawn) + 1)[:, None]
    assert np.abs(shares - steps * np.array([0.5, 0.2, 0.3])).max() < 1
    for name, size in (("a", 7), ("b", 900), ("c", 40)):
        own = [(epoch, index) for part, epoch, index in drawn if part == name]
        for start in range(
            0, len(own) - size, size
        ):  # each part goes through all of its samples before it begins again
            assert sorted(own[start : start + size]) == [(start // size, index) for index in range(size)]
    orders = {tuple(index for _, index in own[start : start + size]) for start in range(0, size * 9, size)}
    assert len(orders) == 9 and tuple(range(size)) not in orders


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.sampled_from([0.1, 0.25, 0.3, 1.0, 2.0, 3.7, 7.0]), min_size=1, max_size=6))
def test_every_blend_is_within_one_sample_of_its_shares(weights):
    blend = BlendedDataset([Numbers(number, 11) for number in range(len(weights))], weights, seed=1)
    drawn = [blend.locate(*place)[0] for place in indices_of_step(blend, 1, 0, 1000)]
    counts = (np.array(drawn)[:, None] == np.arange(len(weights))).cumsum(0)
    shares = np.arange(1, 1001)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(counts - shares).max() < 1 - 1e-9


def test_weights_without_a_common_denominator_and_too_small_ones():
    weights = np.array([2**0.5, 3**0.5, 5**0.5])
    blend = BlendedDataset([Numbers(n, 9**5) for n in range(3)], weights, seed=1)
    counts = np.bincount(blend._table[0], minlength=3)
    assert np.abs(counts - 65_536 * weights / weights.sum()).max() < 1
    with pytest.raises(DataError, match="part 1 would be less than one sample in 65,536"):
        BlendedDataset([Numbers("a", 3), Numbers("b", 3)], [1e-9, 1.0], seed=1)


def test_weights_of_tokens():
    """Samples of 30 and of 10 tokens at equal weights: three times as many of the short ones."""
    parts = [Numbers("long", 8), Numbers("short", 80)]
    parts[0].mean_length, parts[1].mean_length = 30, 10
    blend = BlendedDataset(parts, [1.0, 1.0], seed=1, by_tokens=True)
    drawn = [blend.locate(*place)[0] for place in indices_of_step(blend, 1, 0, 80)]
    assert drawn.count(0) == 20


def test_mean_lengths(tmp_path):
    samples = SampleDataset(write_samples(tmp_path / "s"), 8)
    assert samples.mean_length == 13 / 4
    assert PackedDataset(samples, seed=1).mean_length == 13 / 2
    assert TextDataset(write(tmp_path / "t", [[n, 2] for n in range(3, 40)]), 8, seed=1).mean_length == 73 / 10


def test_a_blend_without_weights_is_shuffled_as_a_whole():
    blend = BlendedDataset([Numbers("a", 20), Numbers("b", 30)], None, seed=1)
    assert indices_of_step(blend, 7, 0, 50) == batch_indices(7, 0, 50, 50) != batch_indices(7, 0, 50, 50, in_order=True)


def test_a_blend_without_weights_is_its_parts_one_after_the_other():
    blend = BlendedDataset([Numbers("a", 2), Numbers("b", 3)], None, seed=1)
    assert [blend.sample(4, index) for index in range(5)] == [
        ("a", 4, 0), ("a", 4, 1), ("b", 4, 0), ("b", 4, 1), ("b", 4, 2),
    ]  # fmt: skip
    with pytest.raises(IndexError):
        blend.sample(0, 5)


def test_running_text_and_samples_can_be_blended(tmp_path):
    text = TextDataset(write(tmp_path / "t", [[n, 2] for n in range(3, 40)]), 8, seed=1)
    samples = PackedDataset(SampleDataset(write_samples(tmp_path / "s"), 8), seed=1)
    blend = BlendedDataset([text, samples], [1.0, 1.0], seed=1)
    batch = load_batch(blend, indices_of_step(blend, 1, 0, 6))
    assert batch["ids"].shape == (6, 8) and {len(row) for row in batch["segments"]} == {1, 2}
