"""What is wrong with a configuration, said in full: every dotted key, the value seen and what was expected."""

import difflib
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from megakd.config.keys import expected, iter_keys, section_of
from megakd.config.section import BrokenRules, Section, WrongValue
from megakd.errors import ConfigError

HINT = "`megakd train --help` lists every key with its type, default and meaning"
LONGEST_VALUE = 60
# What transformers, TRL, NeMo and Megatron call what is another word here.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "betas": "optimizer.beta1",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "max_grad_norm": "optimizer.clip_grad",
    "gradient_clip_val": "optimizer.clip_grad",
    "lr_scheduler_type": "schedule.kind",
    "warmup": "schedule.warmup_steps",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "num_train_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_checkpointing": "train.recompute",
    "activations_checkpoint_granularity": "train.recompute",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "sequence_parallel": "parallel.sp",
    "num_layers_in_first_pipeline_stage": "student.pipeline.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "student.pipeline.last_stage_layers",
    "moe_aux_loss_coeff": "routing.balance_weight",
    "router_aux_loss_coef": "routing.balance_weight",
    "moe_z_loss_coeff": "routing.z_loss_weight",
    "moe_router_bias_update_rate": "routing.bias_update_rate",
    "seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "dataset": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "model_name_or_path": "student.checkpoint",
    "teacher_model_name_or_path": "teacher.checkpoint",
    "kd_loss": "loss.divergence",
    "kd_loss_weight": "loss.kd_weight",
    "sft_loss_weight": "loss.ce_weight",
    "tau": "loss.temperature",
    "topk": "loss.top_k",
    "eval_steps": "eval.every_steps",
    "val_check_interval": "eval.every_steps",
    "limit_val_batches": "eval.samples",
    "save_steps": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "save_top_k": "checkpoint.keep_last",
    "output_dir": "run.dir",
    "explicit_log_dir": "run.dir",
    "logging_steps": "log.every_steps",
}


def explain(error: ValidationError, root: type[Section], where: str, overridden: Collection[str] = ()) -> ConfigError:
    """Turns pydantic's report into one ConfigError that lists every problem.

    Args:
        error: raised while `root` was validated.
        root: the section class that was validated.
        where: the file, or whatever else the values came from.
        overridden: dotted keys that the command line set; their problems say so.
    """
    problems: dict[str, str] = {}
    for entry in error.errors(include_url=False):
        for key, text in _problems_of(entry, root):
            by_hand = any(one == key or one.startswith(f"{key}.") for one in overridden)
            origin = " (set on the command line)" if by_hand else ""
            if key not in problems or isinstance(_raised(entry), WrongValue):  # one that may be of several types fails
                problems[key] = f"{key}: {text}{origin}"  # for each, and the first says enough unless one knows why
    return problems_error(where, list(problems.values()))


def problems_error(where: str, problems: Sequence[str], hint: str = HINT) -> ConfigError:
    """One ConfigError of a list of `key: what is wrong` lines."""
    if len(problems) == 1:
        return ConfigError(f"{where}: {problems[0]}", hint=hint)
    return ConfigError("\n  ".join([f"{where}: {len(problems)} problems", *problems]), hint=hint)


def shown(value: Any) -> str:
    """A value as a reader of YAML would write it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a section ({', '.join(map(str, value)) or 'empty'})"
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def nearest_key(key: str, root: type[Section]) -> str | None:
    """The known dotted key that a misspelt or misplaced `key` most likely means, or None."""
    names = [known.name for known in iter_keys(root)]
    sections = {name.rpartition(".")[0] for name in names} - {""}
    parent, _, last = key.rpartition(".")
    if last in ELSEWHERE:
        return ELSEWHERE[last]
    siblings = [name for name in [*names, *sections] if name.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in siblings], n=1)
    if close:
        return f"{parent}.{close[0]}" if parent else close[0]
    namesakes = [name for name in [*names, *sections] if name.rpartition(".")[2] == last]
    namesakes.sort(key=lambda name: name.count("."))  # the section that everybody has before one of a section
    return next(iter([*namesakes, *difflib.get_close_matches(key, names, n=1)]), None)


def _problems_of(entry: dict[str, Any], root: type[Section]) -> list[tuple[str, str]]:
    kind = entry["type"]
    location = entry["loc"] if kind == "extra_forbidden" else _known_part(entry["loc"], root)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    broken = _raised(entry)
    if isinstance(broken, BrokenRules):
        return [(f"{key}.{inner}" if key else inner, text) for inner, text in broken.problems]
    if isinstance(broken, WrongValue):
        return [(key, str(broken))]
    if kind == "extra_forbidden":
        meant = nearest_key(key, root)
        return [(key, f"unknown key; did you mean {meant}?" if meant else "unknown key")]
    if not location:
        return [("the document", f"{shown(entry['input'])}, expected sections such as `train:` with keys below them")]
    wanted = _expected_at(location, root)
    return [
        (key, f"missing, expected {wanted}" if kind == "missing" else f"{shown(entry['input'])}, expected {wanted}")
    ]


def _raised(entry: dict[str, Any]) -> Exception | None:
    """What a validator of ours raised."""
    return entry.get("ctx", {}).get("error")


def _known_part(location: tuple[str | int, ...], root: type[Section]) -> tuple[str | int, ...]:
    """The beginning of a location that consists of keys; pydantic goes on with which of several types it tried."""
    section: type[Section] | None = root
    for depth, part in enumerate(location):
        if isinstance(part, str):
            if section is None or part not in section.model_fields:
                return location[:depth]
            section = section_of(section.model_fields[part].annotation)
    return location


def _expected_at(location: tuple[str | int, ...], root: type[Section]) -> str:
    """What the schema wants at a place that it knows (an unknown key is not asked about)."""
    section, words = root, ""
    for part in location:
        if isinstance(part, int):
            words = words.removeprefix("list of ")
            continue
        field = section.model_fields[part]
        words = expected(field)
        section = section_of(field.annotation) or section
    return words
