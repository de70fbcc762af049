"""Part of check_kernels.py: whole training steps of one rank, with a live teacher, with its recording, and without.

The very classes that a run uses: Megatron's model, wrapper, optimizer and schedule, StudentStep, OnlineTeacher, and a
CachedTeacher that reads a cache which a Recorder has written, ahead of its step as the loop does. Only the weights
(drawn on the device) and the tokens are made up.
"""

import argparse
import contextlib
import pathlib
import tempfile
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from gpu_clock import Clock

VOCAB = 131072 - 300  # padded to 131,072
LAYERS = {"num_query_groups": 8, "tie_embeddings": True, "max_sequence_length": 4096}
STUDENT = LAYERS | {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 16}
TEACHER = LAYERS | {"num_layers": 24, "hidden_size": 2560, "ffn_hidden_size": 6912, "num_attention_heads": 16}
TINY = {"num_layers": 1, "ffn_hidden_size": 16, "num_attention_heads": 2, "max_sequence_length": 2}
MICRO_BATCHES, REPEATS, TOP_K = 4, 3, 64


def time_steps(options: argparse.Namespace, emit: Callable[[dict], None]) -> None:
    """Seconds and supervised tokens a second of a step of each kind."""
    from megakd.megatron_on_cpu import install

    install(options.device)  # before Megatron is imported for the first time
    from megakd.ranks import Ranks

    with Ranks(options.device) as ranks, contextlib.ExitStack() as held, measured_groups() as groups:
        vocab, top_k = (500, 5) if options.tiny else (VOCAB, TOP_K)
        student_size, teacher_size = (
            (TINY | {"hidden_size": 8}, TINY | {"hidden_size": 16}) if options.tiny else (STUDENT, TEACHER)
        )
        config = build_config(student_size, top_k, "fp32" if options.tiny else "bf16")
        student, teacher = (
            build_model(size, config, groups, vocab, ranks.device) for size in (student_size, teacher_size)
        )
        micro_batches = make_batch(vocab, student_size["max_sequence_length"], ranks.device)
        steps = kinds_of_steps(config, student, teacher, groups, micro_batches, held)
        once = argparse.Namespace(**vars(options) | {"repeats": 1 if options.tiny else REPEATS})
        tokens = sum(len(m.labels_T) for m in micro_batches)
        flops = model_flops(config, student_size, teacher_size, vocab)

        def emit_with_rate(row: dict):
            seconds = row["seconds"]
            emit(row | {"tokens_per_second": tokens / seconds, "flops_per_second": tokens * row["flops"] / seconds})

        clock = Clock(once, emit_with_rate)
        for kind, step in steps.items():
            clock.row("training step", step, kind=kind, tokens=tokens, flops=flops[kind], kernels=True,
                      student=student_size, teacher=teacher_size)  # fmt: skip


@contextlib.contextmanager
def measured_groups():
    """The process groups of one rank."""
    from megakd.models.groups import build_groups, destroy_groups

    try:
        yield build_groups(1, 1, seed=1)
    finally:
        destroy_groups()


def build_config(student: dict, top_k: int, precision: str):
    from megakd.config import Config

    return Config.from_dict(
        {
            "run": {"dir": "unused"},
            "student": {"model": student},
            "teacher": {"checkpoint": "unused"},
            "loss": {"top_k": top_k, "ce_weight": 0.2},
            "data": {"train": "unused", "tokenizer": "unused", "sequence_length": student["max_sequence_length"]},
            "train": {"steps": 100, "global_batch_size": MICRO_BATCHES, "precision": precision},
            "optimizer": {"lr": 1e-5},
        }
    )


def build_model(size: dict, config, groups, vocab: int, device):
    """A GPT with weights that are drawn on the device: those of a run come from the host, layout by layout."""
    from megakd.config import Model
    from megakd.models.gpt import build_gpt, padded_vocab_size

    gpt = build_gpt(
        Model.model_validate(size | {"vocab_size": vocab}), config.parallel, config.train, groups, vocab_size=vocab,
        padded_size=padded_vocab_size(vocab), device=device, seed=None,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(size["hidden_size"])
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    return gpt


def make_batch(vocab: int, length: int, device) -> list:
    from megakd.models.micro_batch import MicroBatch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (MICRO_BATCHES, length + 1), generator=generator)
    return [MicroBatch(row[None, :-1].contiguous(), row[None, 1:].contiguous()).to(device) for row in ids]


def kinds_of_steps(config, student, teacher, groups, micro_batches: list, held: contextlib.ExitStack) -> dict:
    """What to run for a step of each kind."""
    from megakd.assembly.setup import CE_ONLY
    from megakd.teachers.online import OnlineTeacher
    from megakd.training.optimizer import build_optimizer, wrap_data_parallel
    from megakd.training.step import StudentStep

    ddp = wrap_data_parallel(student, config, groups)
    optimizer, scheduler = build_optimizer(ddp, config, config.train.steps, groups)
    optimizer.reload_model_params()
    loss = config.loss
    online = OnlineTeacher(teacher, top_k=loss.top_k, temperature=loss.temperature, groups=groups)
    folder = pathlib.Path(held.enter_context(tempfile.TemporaryDirectory()))
    cached = record(folder, teacher, loss.top_k, groups, micro_batches)

    def step(source, loss):
        one = StudentStep(student, ddp, source, None, loss, optimizer, scheduler, groups)
        return partial(one, step=1, measure=False)

    ahead, from_recording = deque([list(micro_batches)]), step(cached, loss)
    cached.prefetch(ahead[0])

    def prefetch_and_step():
        ahead.append(list(micro_batches))  # a step of its own, for all the teacher knows
        cached.prefetch(ahead[-1])
        from_recording(ahead.popleft())

    return {
        "KD, live teacher": partial(step(online, loss), micro_batches),
        "KD, recorded teacher": prefetch_and_step,
        "CE": partial(step(None, CE_ONLY), micro_batches),
    }


def record(folder: pathlib.Path, teacher, top_k: int, groups, micro_batches: list):
    """The teacher's recording of the batch, opened."""
    from megakd.cache import CacheReader, Contents, Header, encode_row, finish, publish_part, writing
    from megakd.cache.shard import ShardWriter
    from megakd.recording.recorder import Recorder
    from megakd.teachers.cached import CachedTeacher
    from megakd.teachers.entries import Recipe

    contents = Contents(vocab_size=teacher.shard.size, top_k=top_k, temperatures=(1.0,), codec="q8")
    header = Header(
        contents=contents, mode="top_k", options={}, tail="measured", tokenizer_fingerprint="made up",
        teacher_fingerprint="made up", data={}, parts=1, created={"command": "check_kernels.py"},
    )  # fmt: skip
    with writing(folder, header):
        shard = ShardWriter()
        for row in Recorder(teacher, Recipe("top_k", top_k, (1.0,)), groups, seed=0).rows(micro_batches):
            shard.add(encode_row(row, contents))
        publish_part(folder, 0, shard)
        finish(folder, header)
    return CachedTeacher([CacheReader(folder, top_k=top_k)], groups, {})


def model_flops(config, student: dict, teacher: dict, vocab: int) -> dict[str, float]:
    """FLOP of a token in a step of each kind."""
    from megakd.config import Model
    from megakd.planning.flops import forward_flops

    learns, speaks = (
        passes * forward_flops(Model.model_validate(size | {"vocab_size": vocab}), config.data.sequence_length)
        for size, passes in ((student, 3), (teacher, 1))
    )
    return {"KD, live teacher": learns + speaks, "KD, recorded teacher": learns, "CE": learns}


def import_transformer_engine(options: argparse.Namespace, emit: Callable[[dict], None]) -> None:
    """Its version, or that it is not installed; what keeps an installed one from being imported is raised."""
    import importlib.util

    if importlib.util.find_spec("transformer_engine") is None:
        emit({"name": "transformer_engine", "version": None})
        return
    import transformer_engine
    import transformer_engine.pytorch

    layer = transformer_engine.pytorch.Linear(64, 64, device=options.device, params_dtype=torch.bfloat16)
    layer(torch.randn(16, 64, dtype=torch.bfloat16, device=options.device)).sum().backward()
    emit({"name": "transformer_engine", "version": transformer_engine.__version__})
