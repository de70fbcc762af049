"""Whole runs on real files: token data from this project's own sources, and the loop without a launcher."""

import contextlib
import functools
import json
import os
import pathlib

import yaml

from tests import forked

ROOT = pathlib.Path(__file__).parents[2]
PIECES = 400
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
UNREPEATABLE = {  # and every key that ends with _seconds
    "seconds", "tokens_per_second", "tflops_per_rank", "peak_memory_bytes", "slowest_rank", "slowest_over_median",
}  # fmt: skip


def prepare(folder: pathlib.Path) -> None:
    """tokenizer.model, train.{bin,idx,json} and validation.* in `folder`."""
    from megakd.runs.prepare import main

    sources = [str(ROOT / "megakd" / name) for name in ("cli.py", "errors.py", "targets.py", "losses.py")]
    main(["tokenizer", "--input", *sources, "--output", f"{folder}/tokenizer.model", "--vocab-size", str(PIECES)])
    for name, files in (("train", sources[:2]), ("validation", sources[2:])):
        main(["text", "--input", *files, "--tokenizer", f"{folder}/tokenizer.model", "--output", f"{folder}/{name}"])


def values(folder: pathlib.Path, run_dir: pathlib.Path, **changes) -> dict:
    """A config as nested dictionaries; `changes` are keys with __ for the dot."""
    config = {
        "run": {"dir": str(run_dir), "device": "cpu"},
        "student": {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "max_sequence_length": 32,
                "init_std": 0.1,
            }
        },
        "data": {
            "train": f"{folder}/train",
            "validation": f"{folder}/validation",
            "tokenizer": f"{folder}/tokenizer.model",
            "sequence_length": 32,
        },
        "train": {"steps": 20, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3},
        "eval": {"samples": 8},
        "log": {"progress": False},
    }
    for key, value in changes.items():
        *path, name = key.split("__")
        functools.reduce(lambda section, part: section.setdefault(part, {}), path, config)[name] = value
    return config


def distil(folder, teacher, run_dir, tp=2, **changes):
    """The same with a teacher."""
    defaults = {"loss": {"top_k": 50, "ce_weight": 0.2}, "train__steps": 6}
    defaults |= {"teacher__checkpoint": str(teacher), "parallel__tp": tp}
    return values(folder, run_dir, **(defaults | changes))


class OneOfThePool:
    """What the loop asks of megakd.ranks.Ranks, on the ranks of tests/ranks.py."""

    def __init__(self, rank: int):
        import torch

        from megakd.ranks.pulse import Pulse

        self.device, self.rank, self.is_main = torch.device("cpu"), rank, rank == 0
        self.pulse = Pulse()

    def on_early_stop(self, function):
        pass

    def agree_to_stop(self) -> bool:
        return False


def train(rank, ranks, config):
    """One rank of a run; returns the text of an explained error."""
    from megakd.config import Config
    from megakd.errors import MegakdError
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.models.groups import destroy_groups
    from megakd.training.loop import train as train_loop

    try:
        train_loop(Config.from_dict(config), OneOfThePool(rank))
    except MegakdError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_groups()


def lines(run_dir, kind="train"):
    """The metrics of a run that must not change from one launch to the next."""
    text = (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in text]
    left_out = UNREPEATABLE | {"kind"}
    return [
        {k: v for k, v in e.items() if k not in left_out and not k.endswith("_seconds")}
        for e in entries
        if e["kind"] == kind
    ]


def assert_close(seen, want, **tolerance):
    """Metrics lines with the same figures to a tolerance; a token at the edge of a bin of confidence may change it."""
    import pytest

    for a, b in zip(seen, want, strict=True):
        a, b = dict(a), dict(b)
        bins = [line.pop("calibration", {}).get("tokens", []) for line in (a, b)]
        assert sum(bins[0]) == sum(bins[1]) == (b["tokens"] if bins[0] else 0)
        assert a == pytest.approx(b, **tolerance)


def write_config(folder, config) -> str:
    file = pathlib.Path(folder) / f"config_{len(list(pathlib.Path(folder).glob('config_*')))}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def by_hand(folder, ranks, verb, config, *overrides, program="megakd.cli") -> list[forked.Forked]:
    """Start a verb's ranks without torchrun, cheaper than with it by all that its ranks import."""
    arguments = [verb, write_config(folder, config), *overrides]
    return forked.by_hand(ranks, program, *arguments, environment=ENVIRONMENT, together=True)


def launch(folder, ranks, verb, config, *overrides) -> forked.Forked:
    """Start a verb under torchrun, whose ranks are real processes."""
    arguments = ["--standalone", f"--nproc-per-node={ranks}", "-m", "megakd", verb, write_config(folder, config)]
    return forked.Forked("torch.distributed.run", *arguments, *overrides, environment=ENVIRONMENT, together=True)


def session_leaders(pid):
    """Children of a process with sessions of their own: torchrun's ranks, a rank's tokenizing workers."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and os.getsid(int(entry.name)) == int(entry.name):
                found.append(int(entry.name))
    return found
