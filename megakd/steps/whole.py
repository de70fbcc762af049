"""A recorded step as one whole: the ranks' parts put together, so that the layout it was computed at no longer shows.

What ranks must have alike and have not is no reason to stop here: it is what a comparison is after, and kept for it.

Legend: N samples, L ids, T supervised tokens, M entries of the teacher.
"""

import dataclasses
import math

import numpy as np

from megakd.errors import StepError
from megakd.steps.folder import IDS, MASKED, SAMPLES, TARGETS, RankPart, StepRecord

ALIKE = 1e-3  # relative: what replicas of a gradient may differ by
PER_TOKEN = ("loss", "kd", "ce", "label_logprob", "log_tail")
STAGE_OF = {"loss": "losses", "kd": "losses", "ce": "losses", "label_logprob": "targets", "log_tail": "targets"}


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Ranks of one launch that should have said the same.

    Attributes:
        stage: where in the order of computation: ids, labels, targets, losses or gradients.
        text: which ranks, and what they have.
    """

    stage: str
    text: str


@dataclasses.dataclass(frozen=True)
class WholeStep:
    """One step.

    Attributes:
        record: its folder.
        samples: arrays `place`, `part`, `epoch`, `index` and `length` [N] of the global batch's samples, in its order.
        start_N: where a sample's ids begin.
        ids_L, labels_L: of all samples.
        sample_T, position_T: where each supervised token is: number of the sample, position in it.
        tokens: arrays `loss`, `kd`, `ce`, `label_logprob` and `log_tail` [T], float32 nats.
        token_M, id_M, logprob_M: the teacher's entries by ascending token and id.
        norms: of the global gradient of every parameter, before clipping.
        conflicts: what its own ranks do not have alike.
    """

    record: StepRecord
    samples: dict[str, np.ndarray]
    start_N: np.ndarray
    ids_L: np.ndarray
    labels_L: np.ndarray
    sample_T: np.ndarray
    position_T: np.ndarray
    tokens: dict[str, np.ndarray]
    token_M: np.ndarray
    id_M: np.ndarray
    logprob_M: np.ndarray
    norms: dict[str, float]
    conflicts: list[Conflict]

    def name(self, sample: int) -> str:
        """A sample as people are told of it."""
        place, part, epoch, index = (int(self.samples[key][sample]) for key in ("place", "part", "epoch", "index"))
        inner = f", {part + 1}. of its row" if part else ""
        return f"sample {place} of the batch (epoch {epoch}, index {index} of the data{inner})"

    def ids_of(self, sample: int) -> np.ndarray:
        start = self.start_N[sample]
        return self.ids_L[start : start + self.samples["length"][sample]]

    def labels_of(self, sample: int) -> np.ndarray:
        start = self.start_N[sample]
        return self.labels_L[start : start + self.samples["length"][sample]]


def read_whole(record: StepRecord) -> WholeStep:
    """Put the parts of all ranks together.

    Raises:
        StepError: a file is missing or damaged, or the parts do not make one batch.
    """
    parts = dict(enumerate(map(record.read_rank, range(record.ranks))))
    conflicts: list[Conflict] = []
    replicas = [
        join_replica({rank: part for rank, part in parts.items() if part.dp == dp}, record, conflicts)
        for dp in range(record.values["layout"]["dp"])
    ]
    arrays = {name: np.concatenate([replica[name] for replica in replicas]) for name in replicas[0]}
    key_N = arrays["place"].astype(np.int64) << 31 | arrays["part"]
    if (np.diff(key_N) <= 0).any():
        raise StepError(f"{record.path} holds a sample twice", hint="do its files belong together? Copy it again")
    tokens_before = np.cumsum([0, *(len(replica["loss"]) for replica in replicas[:-1])])
    token_M = np.concatenate([r["token"] + n for r, n in zip(replicas, tokens_before, strict=True)])
    length_N = arrays["length"].astype(np.int64)
    start_N = np.cumsum(length_N) - length_N
    sample_L = np.repeat(np.arange(len(length_N)), length_N)
    supervised_T = np.flatnonzero(arrays["labels"] != MASKED)
    return WholeStep(
        record=record,
        samples={name: arrays[name] for name in SAMPLES},
        start_N=start_N,
        ids_L=arrays["ids"],
        labels_L=arrays["labels"],
        sample_T=sample_L[supervised_T],
        position_T=supervised_T - start_N[sample_L[supervised_T]],
        tokens={name: arrays[name] for name in PER_TOKEN},
        token_M=token_M,
        id_M=arrays["target_ids"],
        logprob_M=arrays["target_logprobs"],
        norms=join_gradients(parts, conflicts),
        conflicts=conflicts,
    )


def join_replica(parts: dict[int, RankPart], record: StepRecord, conflicts: list[Conflict]) -> dict[str, np.ndarray]:
    """The arrays of one data-parallel rank's share, from its tensor- and pipeline-parallel ranks."""
    first = next(iter(parts), None)
    last_stage = {rank: part for rank, part in parts.items() if "loss" in part.arrays}
    if not last_stage:
        raise StepError(
            f"{record.path} has no losses of a data-parallel rank", hint="do its files belong together? Copy it again"
        )
    for rank, part in parts.items():
        for name in (*SAMPLES, *IDS):
            if not np.array_equal(part.arrays[name], parts[first].arrays[name]):
                stage = "labels" if name == "labels" else "ids"
                where = first_difference(part.arrays[name], parts[first].arrays[name])
                conflicts.append(Conflict(stage, f"rank {rank} has other {name} than rank {first}: {where}"))
                break
    teller, told = next(iter(last_stage.items()))
    for rank, part in last_stage.items():
        for name in PER_TOKEN:
            if not np.array_equal(part.arrays[name], told.arrays[name], equal_nan=True):
                where = first_difference(part.arrays[name], told.arrays[name])
                conflicts.append(
                    Conflict(STAGE_OF[name], f"rank {rank} has another {name} than rank {teller}: {where}")
                )
    samples = {name: parts[teller].arrays[name] for name in (*SAMPLES, *IDS)}
    return samples | {name: told.arrays[name] for name in PER_TOKEN} | join_entries(list(last_stage.values()))


def first_difference(a: np.ndarray, b: np.ndarray) -> str:
    if len(a) != len(b):
        return f"{len(a)} of them, not {len(b)}"
    at = int(np.flatnonzero((a != b) & ~((a != a) & (b != b)))[0])
    return f"{a[at]:.6g}, not {b[at]:.6g}, at {at}"


def join_entries(parts: list[RankPart]) -> dict[str, np.ndarray]:
    """The teacher's entries of all parts of the vocabulary, by token and id."""
    tokens = [np.repeat(np.arange(len(part.arrays["entries"])), part.arrays["entries"]) for part in parts]
    token_M = np.concatenate(tokens)
    joined = {name: np.concatenate([part.arrays[name] for part in parts]) for name in TARGETS}
    order_M = np.lexsort((joined["target_ids"], token_M))
    return {"token": token_M[order_M]} | {name: values[order_M] for name, values in joined.items()}


def join_gradients(parts: dict[int, RankPart], conflicts: list[Conflict]) -> dict[str, float]:
    """The norm of every parameter's gradient: split parts add up over tp, copies are counted once."""
    shards: dict[tuple[str, int | None], list[tuple[int, float]]] = {}  # (name, shard) to (rank, norm) of its copies
    for rank, part in parts.items():
        for (name, split), squares in zip(part.parameters, part.arrays["squares"].tolist(), strict=True):
            shards.setdefault((name, part.tp if split else None), []).append((rank, math.sqrt(squares)))
    norms: dict[str, float] = {}
    for (name, _), copies in shards.items():
        norms[name] = math.hypot(norms.get(name, 0.0), copies[0][1])
    small = ALIKE / 100 * math.hypot(*norms.values())
    for (name, _), ((teller, known), *others) in shards.items():
        for rank, norm in others:
            if not math.isclose(norm, known, rel_tol=ALIKE, abs_tol=small):
                text = f"{name}: rank {rank} has a gradient of norm {norm:.6g}, rank {teller} its copy with {known:.6g}"
                conflicts.append(Conflict("gradients", text))
    return norms
