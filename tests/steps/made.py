"""Recorded steps without a run: one batch, as the ranks of any layout would have written it."""

import dataclasses
import pathlib

import numpy as np

from megakd.steps.folder import RankPart, StepRecord, read_record, write_rank, write_record
from megakd.steps.whole import WholeStep, read_whole

LENGTHS = [5, 3, 7, 2]  # of the samples; the second and third are packed into one row
ROWS = [(0, 0), (1, 0), (1, 1), (2, 0)]
VOCAB, TOP_K = 23, 3
SPLIT, WHOLE = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"


@dataclasses.dataclass
class Batch:
    """One step's values, free to be changed before they are written.

    Attributes:
        ids, labels: of each sample.
        losses, tails: of each supervised token.
        entries: of each supervised token, (id, logprob) pairs.
        squares: of WHOLE, and of SPLIT on each of two tensor-parallel ranks.
    """

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    losses: np.ndarray
    tails: np.ndarray
    entries: list[list[tuple[int, float]]]
    squares: tuple[float, float, float] = (4.0, 9.0, 16.0)


def batch() -> Batch:
    random = np.random.default_rng(1)
    ids = [random.integers(0, VOCAB, n) for n in LENGTHS]
    labels = [np.roll(x, -1) for x in ids]
    labels[0][-1] = labels[2][0] = -100
    tokens = sum(LENGTHS) - 2
    entries = [list(zip(sorted(random.choice(VOCAB, TOP_K, replace=False).tolist()), [-1.0, -2.0, -3.0], strict=True))
               for _ in range(tokens)]  # fmt: skip
    return Batch(ids, labels, random.uniform(1, 2, tokens), np.full(tokens, -0.9), entries)


def parts(batch: Batch, tp: int, pp: int, dp: int) -> list[RankPart]:
    """The ranks' parts; dp 2 has two samples each."""
    shares = [[0, 1, 2, 3]] if dp == 1 else [[0], [1, 2, 3]]
    owner = np.repeat(np.arange(4), [(x != -100).sum() for x in batch.labels])
    found = []
    for stage in range(pp):
        for d, share in enumerate(shares):
            tokens = [t for t in range(len(owner)) if owner[t] in share]
            found += [part(batch, share, tokens, (t, tp), (stage, pp), d) for t in range(tp)]
    return found


def part(batch, share, tokens, shard, stage, d) -> RankPart:
    rows = [ROWS[n] for n in share]
    arrays = {
        "place": np.array([row for row, _ in rows], "i4"),
        "part": np.array([inner for _, inner in rows], "i4"),
        "epoch": np.zeros(len(share), "i8"),
        "index": np.array([17 + row for row, _ in rows], "i8"),
        "length": np.array([LENGTHS[n] for n in share], "i4"),
        "ids": np.concatenate([batch.ids[n] for n in share]).astype("i4"),
        "labels": np.concatenate([batch.labels[n] for n in share]).astype("i4"),
    }
    if stage[0] == stage[1] - 1:
        own = [[e for e in batch.entries[t] if e[0] * shard[1] // VOCAB == shard[0]] for t in tokens]
        flat = [e for entries in own for e in entries]
        arrays |= {name: batch.losses[tokens].astype("f4") for name in ("loss", "kd", "ce")}
        arrays |= {
            "label_logprob": np.full(len(tokens), -1.5, "f4"),
            "log_tail": batch.tails[tokens].astype("f4"),
            "entries": np.array([len(entries) for entries in own], "i4"),
            "target_ids": np.array([e[0] for e in flat], "i4"),
            "target_logprobs": np.array([e[1] for e in flat], "f4"),
        }
    whole, *halves = batch.squares
    arrays["squares"] = np.array([whole, sum(halves) if shard[1] == 1 else halves[shard[0]]])
    return RankPart(shard[0], stage[0], d, arrays, [(WHOLE, False), (SPLIT, True)])


def write(folder: pathlib.Path, ranks: list[RankPart], **values) -> StepRecord:
    folder.mkdir(parents=True)
    sizes = {axis: 1 + max(getattr(p, axis) for p in ranks) for axis in ("tp", "pp", "dp")}
    record = {
        "step": 1,
        "layout": sizes,
        "weights": {"from": "drawn"},
        "settings": {"teacher.checkpoint": "there", "loss.top_k": TOP_K},
        "model": {"hidden_size": 32},
        "teacher": {"kind": "online", "model": {"rotary_base": 10000}},
        "data": {"train": "abc"},
        "tokenizer": "f00d",
        "precision": "fp32",
        "device": "cpu",
        "metrics": {"loss": 1.5},
        "versions": ["megakd 0.1.0", "python 3.11"],
        "ranks": [write_rank(folder, rank, p) for rank, p in enumerate(ranks)],
    }
    write_record(folder, record | values)
    return read_record(folder)


def whole(folder: pathlib.Path, batch: Batch, tp=1, pp=1, dp=1) -> WholeStep:
    return read_whole(write(folder, parts(batch, tp, pp, dp)))
