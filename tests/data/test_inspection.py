"""Samples and lengths for people."""

from megakd.data.inspection import describe_dataset, draw_lengths, render_sample
from megakd.data.samples import PackedDataset, SampleDataset
from tests.data.byte_tokenizer import END, EOS

SAMPLES = [([*b"Q", *b" A", EOS], [0, 1, 1, 1]), ([*"\0é".encode(), *b"x\n", END], [0, 0, 0, 1, 1, 0])]


def test_supervised_parts_are_marked(letters, tmp_path):
    data = SampleDataset(write_samples_of(tmp_path), 9)
    assert render_sample(data.sample(0, 0), letters, color=False) == "Q[[ A<eos>]]"
    assert render_sample(data.sample(0, 1), letters, color=False) == "␀é[[x\n]]"
    assert render_sample(data.sample(0, 0), letters, color=True) == "Q\x1b[32m A<eos>\x1b[0m"
    packed = PackedDataset(data, seed=1)
    assert render_sample(packed.sample(0, 0), letters, color=False) == "Q[[ A<eos>]]\n--- packed with\n␀é[[x\n]]"


def test_description_counts_and_draws(letters, tmp_path):
    data = SampleDataset(write_samples_of(tmp_path), 9)
    text = describe_dataset(data, letters, samples=1, color=False)
    for line in (
        "2 samples of at most 9 tokens",
        "  dropped: 0",
        "mean 4.0, longest 5",
        "--- sample 0",
        "Q[[ A<eos>]]",
    ):
        assert line in text
    assert "--- sample 1" not in text and text.count("#" * 50) == 2
    draw_lengths(data, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def write_samples_of(tmp_path):
    from megakd.data.token_files.writer import TokenFileWriter

    with TokenFileWriter(
        tmp_path / "x", tokenizer_fingerprint="aa", vocab_size=260, eos_appended=False, masked=True
    ) as writer:
        for ids, mask in SAMPLES:
            writer.add(ids, mask)
    return tmp_path / "x"
