"""A student, a teacher and batches small enough for tests, at any layout, without data files or checkpoints."""

import contextlib

import pytest
import torch

VOCAB = 1000  # padded to 1024
SEQUENCE = 16


@contextlib.contextmanager
def layout(tp=1, pp=1, seed=1, **axes):
    """The device seam and process groups for one call on the ranks of tests/ranks.py."""
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.models.groups import build_groups, destroy_groups

    try:
        yield build_groups(tp, pp, seed, **axes)
    finally:
        destroy_groups()


@contextlib.contextmanager
def in_buckets(elements):
    """Gradients are reduced while the backward goes on, in buckets of about so many, as on GPUs; None: in one piece."""
    from megakd.training import megatron_fsdp, optimizer

    upstream = optimizer.DistributedDataParallelConfig
    with pytest.MonkeyPatch.context() as patch:
        if elements:
            small = lambda **options: upstream(**options | {"bucket_size": elements})  # noqa: E731
            for module in (optimizer, megatron_fsdp):
                patch.setattr(module, "DistributedDataParallelConfig", small)
            patch.setattr(optimizer, "overlaps_reduction", lambda gpt, groups: True)
        yield


@contextlib.contextmanager
def wider_teacher(config, groups):
    """Groups of a teacher with a tp of its own, for as long as it lives; None of one without."""
    from megakd.models.groups import build_wider_groups

    wider = build_wider_groups(groups, config.teacher_parallel.tp) if config.students_per_teacher > 1 else None
    try:
        yield wider
    finally:
        if wider:
            wider.destroy()


def config(tp=1, pp=1, **changes):
    """A valid config; `changes` are dotted keys with __ for the dot."""
    from megakd.config import Config

    values = {
        "run": {"dir": "unused"},
        "parallel": {"tp": tp, "pp": pp},
        "student": {"model": student_section()},
        "teacher": {"checkpoint": "unused"},
        "loss": {"top_k": 20, "ce_weight": 0.25, "temperature": 2.0},
        "data": {"train": "unused", "tokenizer": "unused", "sequence_length": SEQUENCE},
        "train": {"steps": 8, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 1e-2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Config.from_dict(values)


def student_section(**changes):
    section = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "max_sequence_length": 64,
        "vocab_size": VOCAB,
    }
    return section | changes


def teacher_section(**changes):
    return student_section(hidden_size=48, tie_embeddings=False, init_std=0.2) | changes


def build(section, config, groups, seed, teacher=False, wider=None):
    from megakd.config import Model
    from megakd.models.gpt import build_gpt
    from megakd.models.sharding import shard
    from megakd.models.wider import take_head

    its_groups = wider.groups if wider else groups
    gpt = build_gpt(
        Model.model_validate(section),
        config.teacher_parallel if teacher else config.parallel,
        config.teacher_train if teacher else config.train,
        its_groups,
        vocab_size=VOCAB,
        padded_size=1024,
        device="cpu",
        seed=seed,
        pipeline=(config.teacher if teacher else config.student).pipeline,
    )
    if wider:
        take_head(gpt, wider, groups)
    if teacher and config.parallel.shards("teacher"):
        shard(gpt, its_groups.dp_cp, trained=False, offload=config.teacher.offload)
    return gpt


def student_step(config, groups, teacher=True, teacher_changes=None, wider=None, **student_changes):
    """A StudentStep with optimizer; its teacher has other weights and another width.

    Args:
        wider: groups of a teacher with a tp of its own.
    """
    from megakd.assembly.setup import CE_ONLY
    from megakd.models.features import FeatureLoss
    from megakd.models.offload import Offload
    from megakd.models.routing import RoutingLosses
    from megakd.models.sharding import is_sharded
    from megakd.teachers.whole import live_teacher
    from megakd.training.optimizer import build_optimizer, wrap_data_parallel
    from megakd.training.step import StudentStep

    gpt = build(student_section(**student_changes), config, groups, seed=1)
    loss, source, features = CE_ONLY, None, None
    if teacher:
        loss = config.loss
        gpt_teacher = build(teacher_section(**(teacher_changes or {})), config, groups, 2, teacher=True, wider=wider)
        offload = Offload(gpt_teacher) if config.teacher.offload and not is_sharded(gpt_teacher) else None
        sharing = wider.sharing if wider else None
        source = live_teacher(gpt_teacher, loss, groups, 4, offload=offload, sharing=sharing)
        if config.features:
            features = FeatureLoss(gpt, gpt_teacher, config.features, seed=3)
    routing = RoutingLosses(gpt, config.routing) if gpt.config.model.moe else None
    ddp = wrap_data_parallel(gpt, config, groups)
    optimizer, scheduler = build_optimizer(ddp, config, config.train.steps, groups)
    return StudentStep(gpt, ddp, source, features, loss, optimizer, scheduler, groups, routing=routing)


def tokens(step, samples=8):
    """The ids and labels of a step's global batch: the first samples have no label at all, another lacks some."""
    ids = torch.randint(0, VOCAB, (samples, SEQUENCE + 1), generator=torch.Generator().manual_seed(step))
    labels = ids[:, 1:].clone()
    labels[: samples // 2] = -100
    labels[0, 3] = ids[0, 4]
    labels[5, 3:9] = -100
    return ids[:, :-1].contiguous(), labels


def batch(step, groups, micro_batch_size, samples=8):
    """This data-parallel rank's micro-batches of that batch; of two ranks, the first has one label."""
    from megakd.models.micro_batch import MicroBatch

    ids, labels = tokens(step, samples)
    share = samples // groups.dp.size()
    starts = range(groups.dp.rank() * share, (groups.dp.rank() + 1) * share, micro_batch_size)
    cut = (groups.cp.rank(), groups.cp.size())
    parts = [slice(i, i + micro_batch_size) for i in starts]
    return [MicroBatch(ids[part], labels[part], cut=cut) for part in parts]


def curve(rank, ranks, tp, pp, micro_batch_size, steps, changes, teacher=True, student_changes=None):
    """The metrics of some steps, on the last rank."""
    with layout(tp, pp, **{axis: changes.get(f"parallel__{axis}", 1) for axis in ("cp", "ep")}) as groups:
        run = student_step(config(tp, pp, **changes), groups, teacher, **(student_changes or {}))
        return [run(batch(i, groups, micro_batch_size), step=i + 1, measure=True) for i in range(steps)]
