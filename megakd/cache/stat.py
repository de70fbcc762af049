"""What a cache holds in numbers: samples, tokens, bytes a token, and the share of the teacher's mass it keeps."""

import dataclasses
import pathlib

import numpy as np

from megakd.cache.header import Header, read_header
from megakd.cache.publish import publishing
from megakd.cache.reader import CacheReader
from megakd.cache.row import row_bytes
from megakd.cache.segments import reduce_tokens
from megakd.errors import CacheError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Figures of a cache.

    Attributes:
        header: the cache's.
        file_bytes: of all its files.
        duplicates: rows whose key another row has too.
        rows_read: how many rows the following figures come from.
        mass_T: mass that the entries hold, at the first recorded temperature, token by token.
        entries_T: number of entries, token by token.
        label_logprob_T: nats; NaN where it was not recorded.
    """

    header: Header
    file_bytes: int
    duplicates: int
    rows_read: int
    mass_T: np.ndarray
    entries_T: np.ndarray
    label_logprob_T: np.ndarray

    @property
    def bytes_per_token(self) -> float:
        """Without the output layer, which is there once for all tokens."""
        head = self.header.head.bytes if self.header.head else 0
        return (self.file_bytes - head) / max(self.header.tokens, 1)


def measure(folder, most_rows: int = 2000) -> Statistics:
    """Figures of a cache; those that need decoding from at most `most_rows` rows, evenly spread over it.

    Raises:
        CacheError: as the reader's.
    """
    header = read_header(folder)
    reader = CacheReader(folder, temperature=next(iter(header.contents.temperatures), 1.0))
    places = [(shard, row) for shard, record in enumerate(header.shards) for row in range(record.rows)]
    if header.contents.hidden_size:
        places = []  # they hold all of the teacher's mass
    chosen = np.unique(np.linspace(0, len(places) - 1, min(most_rows, len(places))).astype(int)) if places else []
    rows = [reader.row(*places[i]) for i in chosen]
    masses = [reduce_tokens(np.add, np.exp(row.logprobs_N.astype(np.float64)), row.counts_T) for row in rows]
    return Statistics(
        header=header,
        file_bytes=sum(path.stat().st_size for path in pathlib.Path(folder).iterdir() if path.is_file()),
        duplicates=reader.index.duplicates(),
        rows_read=len(rows),
        mass_T=np.concatenate([*masses, np.empty(0)]),
        entries_T=np.concatenate([*(row.counts_T for row in rows), np.empty(0, np.int64)]),
        label_logprob_T=np.concatenate([*(row.label_logprob_T for row in rows), np.empty(0)]),
    )


def describe(stats: Statistics) -> str:
    """The figures as lines of text."""
    header, contents = stats.header, stats.header.contents
    temperatures = ", ".join(f"{t:g}" for t in contents.temperatures) or "any"
    kept = f"at most {contents.top_k} entries a token"
    if header.head:
        kept = f"{contents.hidden_size:,} channels a token ({row_bytes(8, 0, contents) / 8:,.0f} bytes)"
    lines = [
        f"mode          {header.mode}, {kept}, codec {contents.codec}",
        f"temperature   {temperatures}",
        f"tail          {header.tail}",
        f"vocabulary    {contents.vocab_size:,} ids, tokenizer {header.tokenizer_fingerprint[:12]}",
        f"teacher       {header.teacher_fingerprint[:12] or 'unknown (imported)'}",
        f"samples       {header.rows:,} in {len(header.shards)} shards, {stats.duplicates} recorded more than once",
        f"tokens        {header.tokens:,} supervised",
        f"bytes         {stats.file_bytes:,}, {stats.bytes_per_token:.1f} a token",
    ]
    if head := header.head:
        cap = f", soft cap {head.softcap:g}" if head.softcap else ""
        lines[-1] += " beside the output layer"
        lines.append(
            f"output layer  {head.rows:,} x {head.hidden_size:,} in {head.dtype}{cap}, {head.bytes:,} bytes, once"
        )
    if len(stats.mass_T):
        points = np.percentile(stats.mass_T, PERCENTILES)
        spread = "  ".join(f"p{p} {value:.4f}" for p, value in zip(PERCENTILES, points, strict=True))
        lines += [
            f"from {stats.rows_read:,} samples:",
            f"  mass kept   mean {stats.mass_T.mean():.4f}  {spread}",
            f"  entries     mean {stats.entries_T.mean():.2f}, most {stats.entries_T.max()}",
        ]
        known_T = stats.label_logprob_T[~np.isnan(stats.label_logprob_T)]
        if len(known_T):
            lines.append(f"  teacher CE  {-known_T.mean():.4f} nats")
    return "\n".join(lines)


def plot(stats: Statistics, path) -> None:
    """Writes the picture of `draw` as a PNG.

    Raises:
        CacheError: it cannot be written; hidden states leave nothing out, of which it would be one.
    """
    if stats.header.contents.hidden_size:
        raise CacheError(
            "the cache holds hidden states, which give the whole of the teacher's distribution: no mass is missing",
            hint="leave --plot out; it shows what entries leave out",
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(stats)
    with publishing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)


def draw(stats: Statistics):
    """A figure: how much of the teacher's mass the entries hold, as the share of tokens that have less than that."""
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    scale = "log" if len(stats.mass_T) else "linear"  # without tokens there is nothing to take logarithms of
    missing_T = np.sort(np.maximum(1 - stats.mass_T, 1e-9))
    left.plot(missing_T, np.arange(1, len(missing_T) + 1) / max(len(missing_T), 1))
    left.set(xscale=scale, xlabel="mass outside the entries", ylabel="share of tokens with at most that", ylim=(0, 1))
    left.grid(alpha=0.3)
    right.hist(stats.mass_T, bins=50, range=(0, 1))
    right.set(xlabel="mass of the entries", ylabel="tokens", yscale=scale)
    if scale == "log":  # whole decades, and a number at some of them: between them numbers would overlap
        decades = np.floor(np.log10(missing_T[0])), np.floor(np.log10(missing_T[-1])) + 1
        left.set_xlim(*10.0 ** np.array(decades))
        right.set_ylim(bottom=0.7)
        for axis in (left.xaxis, right.yaxis):
            axis.set_major_locator(LogLocator(numticks=6))
            axis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"{stats.header.contents.top_k} entries a token, {stats.header.tokens:,} tokens")
    return figure
