"""A dataset for people: decoded samples with their supervised parts marked, and how long samples are."""

from pathlib import Path

import numpy as np

from megakd.data.dataset import IGNORED
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import DataError
from megakd.publish import publishing

_ON, _OFF = ("\x1b[32m", "\x1b[0m"), ("[[", "]]")
_BINS, _WIDTH = 16, 50
_MOST = 100_000  # samples whose lengths are looked at


def describe_dataset(dataset, tokenizer: Tokenizer, *, samples: int, color: bool) -> str:
    """Counts, a histogram of lengths, and the first samples; what is supervised is green, or [[so]] without colour."""
    lines = [f"{len(dataset):,} samples of at most {dataset.sequence_length} tokens"]
    lines += [f"  {name}: {count:,}" for name, count in getattr(dataset, "counts", {}).items()]
    lengths = lengths_of(dataset)
    counts, edges = np.histogram(lengths, bins=min(_BINS, dataset.sequence_length), range=(0, dataset.sequence_length))
    lines += ["", f"tokens a sample (mean {lengths.mean():.1f}, longest {lengths.max()}):"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "#" * int(np.ceil(_WIDTH * count / counts.max()))
        lines.append(f"  {low:7.0f} - {high:7.0f} {count:9,} {bar}")
    for index in range(min(samples, len(dataset))):
        lines += ["", f"--- sample {index}", render_sample(dataset.sample(0, index), tokenizer, color)]
    return "\n".join(lines)


def render_sample(sample: dict, tokenizer: Tokenizer, color: bool) -> str:
    """The text of a sample with its supervised tokens marked; special tokens are spelled out.

    A token is marked if it is a label, so the first of a segment never is.
    """
    begin, end = _ON if color else _OFF
    pieces: list[tuple[bool, bytes]] = []
    start = 0
    for number, length in enumerate(sample["segments"]):
        ids, labels = (sample[name][start : start + length] for name in ("ids", "labels"))
        start += length
        if number:
            pieces.append((False, b"\n--- packed with\n"))
        pieces.append((False, tokenizer.id_to_bytes(int(ids[0]))))
        following = [*ids[1:], labels[-1]]  # the label of the last id is a token that no id shows
        for token, label in zip(following, labels, strict=True):
            if token != IGNORED:
                pieces.append((label != IGNORED, tokenizer.id_to_bytes(int(token))))
    text, marked, run = "", False, b""
    for supervised, piece in [*pieces, (None, b"")]:
        if supervised != marked:
            shown = _printable(run.decode("utf-8", errors="replace"))
            text += f"{begin}{shown}{end}" if marked and shown else shown
            marked, run = supervised, b""
        run += piece
    return text


def lengths_of(dataset) -> np.ndarray:
    """Tokens of each sample (of the first 100,000)."""
    return np.array([dataset.length(0, index) for index in range(min(len(dataset), _MOST))])


def draw_lengths(dataset, path: Path) -> None:
    """Write a histogram of the samples' lengths as a picture.

    Raises:
        DataError: matplotlib is missing, or does not know the file's ending.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DataError("pictures need matplotlib", hint='pip install "megakd[plots]"') from error

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.hist(lengths_of(dataset), bins=50, range=(0, dataset.sequence_length))
    axes.set(xlabel="tokens of a sample", ylabel="samples", title=f"{len(dataset):,} samples")
    try:
        with publishing(path) as incomplete:
            figure.savefig(incomplete, dpi=120, bbox_inches="tight", format=Path(path).suffix.lstrip(".") or "png")
    except ValueError as error:
        raise DataError(f"cannot write {path}: {error}", hint="a picture ends in .png, .svg or .pdf") from error
    finally:
        pyplot.close(figure)


def _printable(text: str) -> str:
    """Control characters other than newline and tab as visible symbols."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
