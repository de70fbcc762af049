"""A recorded step on disk: defined, written and read here alone.

    step_00000500/
      step.json                what the step was, and every file below with its size and digests
      rank_00003.safetensors   of each rank: what it read, was taught and lost, and its part of the gradient
      weights/                 a checkpoint (without optimizer): the student before the step; not of a first step

A rank's file holds these arrays. N samples, L ids of all of them, T supervised tokens and M entries of the teacher, one
after the other in the order of samples and positions; P parameters:

    place, part      int32 [N]    row of the global batch; which sample of that row (0, unless samples are packed)
    epoch, index     int64 [N]    of the row in the data set
    length           int32 [N]    ids of the sample
    ids, labels      int32 [L]    -100 is a label that is not supervised
    loss, kd, ce     float32 [T]  of each supervised token, nats (the first weighted); on the last pipeline stage alone,
    label_logprob    float32 [T]  as everything down to target_logprobs; the teacher's, of the label
    log_tail         float32 [T]  the teacher's mass outside its entries
    entries          int32 [T]    how many entries of the teacher this rank's part of the vocabulary holds
    target_ids       int32 [M]    those entries, by ascending id
    target_logprobs  float32 [M]  and their log-probabilities
    squares          float64 [P]  sum of squares of this rank's part of the global gradient, before clipping

Metadata `parameters` is a JSON list of [name, split] for `squares`: split parameters are cut over the tensor-parallel
ranks, of the others each rank has the whole. Names are the same at every layout.
"""

import dataclasses
import json
import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megakd import __version__
from megakd.digests import ALGORITHM, CHUNK_BYTES, DigestingFile, FileDigests, VerifiedFile, digest_of
from megakd.errors import StepError
from megakd.limits import parse_json
from megakd.publish import publish_text

FORMAT_VERSION = 1
RECORD, WEIGHTS = "step.json", "weights"
SAMPLES = {"place": "i4", "part": "i4", "epoch": "i8", "index": "i8", "length": "i4"}
IDS = {"ids": "i4", "labels": "i4"}
TOKENS = {"loss": "f4", "kd": "f4", "ce": "f4", "label_logprob": "f4", "log_tail": "f4", "entries": "i4"}
TARGETS = {"target_ids": "i4", "target_logprobs": "f4"}
SQUARES = {"squares": "f8"}
MASKED = -100
KINDS = {
    "step": int,
    "layout": dict,
    "weights": dict,
    "settings": dict,
    "model": dict,
    "teacher": dict | None,
    "data": dict,
    "tokenizer": str,
    "precision": str,
    "device": str,
    "metrics": dict,
    "versions": list,
    "ranks": list,
}


@dataclasses.dataclass(frozen=True)
class RankPart:
    """What one rank knows of a step.

    Attributes:
        tp, pp, dp: its place in the layout.
        arrays: by the names above.
        parameters: (name, split) of `squares`.
    """

    tp: int
    pp: int
    dp: int
    arrays: dict[str, np.ndarray]
    parameters: list[tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What a folder says of its step.

    Attributes:
        path: the folder.
        values: of step.json: `step`; `layout` ({"tp", "pp", "dp"}); `weights`, where those before the step are from:
            {"from": "drawn" | "checkpoint" | "folder", ...}; `settings`, the dotted keys of the run; `model`, the
            student's section; `teacher`, that of a teacher that runs; `data`, what identifies it; `tokenizer`, its
            fingerprint; `precision`; `device`; `metrics`; `versions`.
    """

    path: pathlib.Path
    values: dict

    @property
    def ranks(self) -> int:
        return len(self.values["ranks"])

    def read_rank(self, rank: int) -> RankPart:
        """One rank's part, every byte of it compared with what was written.

        Raises:
            StepError: its file is missing or damaged.
        """
        entry = self.values["ranks"][rank]
        path = self.path / rank_file(rank)
        try:
            with VerifiedFile(path, FileDigests(entry["bytes"], entry["digests"])) as file:
                content = file.read()
            arrays = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            parameters = [(str(name), bool(split)) for name, split in json.loads(header["__metadata__"]["parameters"])]
            check_arrays(arrays, len(parameters))
        except FileNotFoundError as error:
            raise self.lacks([rank]) from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StepError(
                f"{path} of rank {rank} is damaged: {error}", hint="copy the folder again, or record the step again"
            ) from error
        return RankPart(entry["tp"], entry["pp"], entry["dp"], arrays, parameters)

    def lacks(self, ranks: list[int]) -> StepError:
        names = ", ".join(rank_file(rank) for rank in ranks[:4]) + (", ..." if len(ranks) > 4 else "")
        return StepError(
            f"{self.path} lacks {names}: it was recorded by {self.ranks} ranks, and {len(ranks)} of their files are "
            "missing",
            hint="copy the whole folder, or record the step again",
        )

    def check_files(self) -> None:
        """Raises StepError, which names them all, where ranks' files are missing or of another size."""
        sizes = [(self.path / rank_file(r)).stat().st_size if (self.path / rank_file(r)).is_file() else None
                 for r in range(self.ranks)]  # fmt: skip
        if missing := [rank for rank, size in enumerate(sizes) if size is None]:
            raise self.lacks(missing)
        for rank, (size, entry) in enumerate(zip(sizes, self.values["ranks"], strict=True)):
            if size != entry["bytes"]:
                raise StepError(
                    f"{self.path / rank_file(rank)} is {size:,} bytes long, {entry['bytes']:,} were written",
                    hint="it was cut off; copy the folder again, or record the step again",
                )

    def describe(self) -> str:
        """One line: step, layout, precision, device and versions."""
        values = self.values
        sizes = " x ".join(f"{axis} {size}" for axis, size in values["layout"].items())
        return f"step {values['step']:,} at {sizes}, {values['precision']} on {values['device']}; " + ", ".join(
            line for line in values["versions"] if line.startswith(("megakd", "torch", "megatron-core"))
        )


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def write_rank(folder: pathlib.Path, rank: int, part: RankPart) -> dict:
    """Write one rank's file; returns its entry for `write_record`."""
    check_arrays(part.arrays, len(part.parameters))
    content = save(part.arrays, {"parameters": json.dumps(part.parameters)})
    with DigestingFile(folder / rank_file(rank)) as file:
        file.write(content)
        file.sync()
    digests = file.digester.digests()
    place = {"tp": part.tp, "pp": part.pp, "dp": part.dp}
    return place | {"bytes": digests.size_bytes, "digests": digests.chunks}


def write_record(folder: pathlib.Path, values: dict) -> None:
    """Write step.json, the last file of a folder; `values` as in StepRecord, and `ranks`: what write_rank returned."""
    values = {
        "format_version": FORMAT_VERSION,
        "megakd_version": __version__,
        "digests": {"algorithm": ALGORITHM, "chunk_bytes": CHUNK_BYTES},
        **values,
    }
    publish_text(folder / RECORD, json.dumps(values | {"digest": own_digest(values)}, indent=1))


def own_digest(values: dict) -> str:
    return digest_of(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def read_record(path: pathlib.Path) -> StepRecord:
    """Read what a folder says of its step, and see that every rank's file is there and of the right size.

    Raises:
        StepError: it is no recorded step, of a later format, edited or cut off, or some rank's file is missing.
    """
    file = path / RECORD
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_step(path) from error
    except OSError as error:
        raise StepError(f"{file} cannot be read: {error.strerror}", hint="check the folder's permissions") from error
    try:
        values = parse_json(content.decode("utf-8"), file, StepError)
        version = values.pop("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise StepError(
                f"{path} has format {version} of a recorded step, this megakd ({__version__}) reads {FORMAT_VERSION}",
                hint=f"use megakd {values.get('megakd_version', 'of a later version')}",
            )
        digest = values.pop("digest")
        if digest != own_digest({"format_version": version, **values}):
            raise ValueError("its values are not those that were written")
        check_values(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StepError(
            f"{file} is damaged: {error}", hint="it was edited or cut off; copy the folder again"
        ) from error
    record = StepRecord(path, values)
    record.check_files()
    return record


def no_step(path: pathlib.Path) -> StepError:
    """The error for a folder that holds no recorded step, with those that are near it."""
    seen = "does not exist" if not path.exists() else f"is no recorded step: it holds no {RECORD}"
    near = sorted(str(found.parent) for pattern in (f"*/{RECORD}", f"*/*/{RECORD}") for found in path.glob(pattern))
    hint = f"recorded steps are in {', '.join(near[:4])}" if near else "run.record_steps=[1] records one"
    return StepError(f"{path} {seen}", hint=hint)


def check_values(values: dict) -> None:
    """Raises ValueError, KeyError or TypeError where step.json does not hold what is read of it."""
    for key, kind in KINDS.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} is {str(values[key])[:100]!r}")
    if values["digests"] != {"algorithm": ALGORITHM, "chunk_bytes": CHUNK_BYTES}:
        raise ValueError(f"digests of the kind {values['digests']}")
    for entry in values["ranks"]:
        if not all(type(entry[key]) is int and entry[key] >= 0 for key in ("tp", "pp", "dp", "bytes")):
            raise TypeError(f"a rank's entry is {str(entry)[:100]!r}")
        FileDigests(entry["bytes"], entry["digests"])
    sizes = values["layout"]
    if len(values["ranks"]) != sizes["tp"] * sizes["pp"] * sizes["dp"]:
        raise ValueError(f"{len(values['ranks'])} ranks for the layout {sizes}")


def check_arrays(arrays: dict[str, np.ndarray], parameters: int) -> None:
    """Raises ValueError or KeyError where arrays are not of the kinds and sizes that belong together."""
    known = {**SAMPLES, **IDS, **SQUARES}
    last = "loss" in arrays
    known |= {**TOKENS, **TARGETS} if last else {}
    if arrays.keys() != known.keys():
        raise ValueError(f"its arrays are {sorted(arrays)}")
    for name, kind in known.items():
        if arrays[name].dtype != kind or arrays[name].ndim != 1:
            raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}")
    counts = {"place": SAMPLES, "ids": IDS} | ({"loss": TOKENS, "target_ids": TARGETS} if last else {})
    for first, names in counts.items():
        if len({len(arrays[name]) for name in names}) != 1:
            raise ValueError(f"arrays of different lengths beside {first}")
    if (arrays["length"] < 0).any() or arrays["length"].sum(dtype=np.int64) != len(arrays["ids"]):
        raise ValueError("lengths that do not add up to the ids")
    if len(arrays["squares"]) != parameters:
        raise ValueError(f"{len(arrays['squares'])} sums of squares for {parameters} parameters")
    if last:
        supervised = int((arrays["labels"] != MASKED).sum())
        if supervised != len(arrays["loss"]):
            raise ValueError(f"{len(arrays['loss'])} losses for {supervised} supervised tokens")
        if (arrays["entries"] < 0).any() or arrays["entries"].sum(dtype=np.int64) != len(arrays["target_ids"]):
            raise ValueError("entries that do not add up to the teacher's ids")
