"""Every axis and their combinations train as one rank does: losses, and the norm of every gradient, to TOLERANCE.

Student and teacher differ in width, depth and in whether the head is the embedding; the teacher runs, or was recorded
by one rank. What of the axes cannot run on a CPU is listed in docs/parallelism.md.
"""

import contextlib
import functools

import pytest

from tests.ranks import run_ranks
from tests.training import curves, small

STEPS = 5
TOLERANCE = 2e-5  # relative; float32 rounding over five steps of Adam, as between micro-batch sizes on one rank
STUDENT = {"num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 24}
TEACHER = {"num_layers": 8, "hidden_size": 24, "ffn_hidden_size": 40}
# What the two are -> changes of (student, teacher).
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 12}
STUDENT_EXPERTS = EXPERTS | {"layers": [1], "shared_ffn_hidden_size": 8}
TEACHER_EXPERTS = EXPERTS | {"num_experts": 8, "score": "sigmoid", "bias": True}
ROUTING = {"routing__balance_weight": 0.1, "routing__z_loss_weight": 0.01}
WINDOWS = {
    "sliding_window": 6,
    "sliding_window_layers": [0, 2],
    "sliding_window_rotary_base": 500.0,
    "attention_softcap": 3.0,
}
LATENT = {
    "num_query_groups": 4,
    "mla": {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
}
ODD = {"hidden_size": 22, "ffn_hidden_size": 25, "kv_channels": 6}  # rows that neither 2 nor 4 ranks share evenly
MODELS = {
    "dense": (STUDENT, TEACHER),
    "dense, not tied": (STUDENT | {"tie_embeddings": False}, TEACHER | {"tie_embeddings": True}),
    "deep": (STUDENT | {"num_layers": 8}, TEACHER | {"num_layers": 12}),
    "windows": (STUDENT | WINDOWS, TEACHER | {"position_embedding": "learned_absolute"}),
    "latent": (STUDENT | LATENT, TEACHER | LATENT),
    "odd": (STUDENT | ODD, TEACHER | ODD | {"hidden_size": 27}),
    "experts": (STUDENT | {"moe": STUDENT_EXPERTS}, TEACHER | {"moe": TEACHER_EXPERTS}),
    "experts, biases": (STUDENT | {"moe": TEACHER_EXPERTS}, TEACHER),
    "expert teacher": (STUDENT, TEACHER | {"moe": TEACHER_EXPERTS}),
}
PARALLEL = ("tp", "pp", "vpp", "cp", "ep", "sp", "fsdp", "fsdp_by")
OTHERS = {
    "recompute": "train__recompute",
    "budget": "loss__logits_memory_budget_bytes",
    "targets": "loss__targets",
    "offload": "teacher__offload",
}
MEGATRON = {"fsdp": "both", "fsdp_by": "megatron"}
# (models, ranks, layout with micro_batch_size, whether the teacher was recorded)
LAYOUTS = [
    ("dense", 2, {"dp": 2}, False),
    ("dense", 2, {"tp": 2}, False),
    ("dense", 2, {"tp": 2, "sp": True}, True),
    ("dense", 2, {"pp": 2}, False),
    ("dense", 2, {"pp": 2}, True),
    ("dense, not tied", 2, {"pp": 2}, False),
    ("dense", 4, {"pp": 4, "micro": 1}, False),
    ("dense", 4, {"pp": 4, "micro": 1}, True),
    ("dense, not tied", 4, {"pp": 4}, False),
    ("dense", 4, {"tp": 2, "pp": 2, "sp": True}, False),
    ("dense", 4, {"tp": 2, "dp": 2, "sp": True}, False),
    ("dense", 4, {"pp": 2, "dp": 2}, True),
    ("dense", 4, {"tp": 4, "heads": 4}, False),
    ("experts", 2, {"dp": 2}, False),
    ("experts", 2, {"ep": 2, "dp": 2}, False),
    ("experts", 2, {"ep": 2, "dp": 2}, True),
    ("experts", 2, {"tp": 2, "sp": True}, False),
    ("experts", 2, {"tp": 2, "sp": True, "ep": 2}, False),
    ("experts, biases", 2, {"ep": 2, "dp": 2}, False),
    ("expert teacher", 2, {"ep": 2, "tp": 2}, False),
    ("experts", 4, {"pp": 2, "dp": 2, "ep": 2}, False),
    ("dense", 2, {"pp": 2, "vpp": 2}, False),
    ("dense, not tied", 2, {"pp": 2, "vpp": 2}, True),
    ("deep", 4, {"pp": 4, "vpp": 2, "micro": 1}, False),
    ("experts", 4, {"tp": 2, "pp": 2, "vpp": 2, "sp": True, "ep": 2, "micro": 1}, False),
    ("dense", 4, {"pp": 2, "vpp": 2, "dp": 2, "micro": 1}, False),
    ("dense", 2, {"pp": 2, "student_first": 1, "teacher_last": 3}, False),
    ("deep", 4, {"pp": 4, "student_first": 1, "student_last": 3, "teacher_first": 3}, False),
    ("dense", 2, {"cp": 2}, False),
    ("dense", 2, {"cp": 2}, True),
    ("windows", 2, {"cp": 2}, False),
    ("latent", 2, {"cp": 2}, False),
    ("dense", 4, {"cp": 4, "micro": 4}, False),
    ("dense", 4, {"cp": 2, "tp": 2, "sp": True}, False),
    ("dense, not tied", 4, {"cp": 2, "pp": 2}, True),
    ("dense", 4, {"cp": 2, "dp": 2}, False),
    ("experts", 4, {"cp": 2, "dp": 2, "ep": 4}, False),
    ("experts", 4, {"tp": 2, "dp": 2, "sp": True, "ep": 4}, False),
    ("dense", 2, {"dp": 2, "fsdp": "teacher"}, False),
    ("dense, not tied", 2, {"dp": 2, "fsdp": "both", "micro": 1, "recompute": "full"}, True),
    ("dense", 2, {"dp": 2, "fsdp": "both", "recompute": "selective", "budget": 40_000}, False),
    ("odd", 4, {"dp": 4, "fsdp": "both", "micro": 1}, False),
    ("dense", 4, {"tp": 2, "dp": 2, "sp": True, "fsdp": "both", "micro": 1}, False),
    ("experts", 4, {"cp": 2, "dp": 2, "fsdp": "both"}, False),
    ("dense", 4, {"pp": 2, "dp": 2, "fsdp": "teacher"}, False),
    ("dense", 1, MEGATRON, False),
    ("dense", 2, {"dp": 2, "micro": 1} | MEGATRON, False),
    ("dense, not tied", 2, {"dp": 2, "micro": 1, "recompute": "full"} | MEGATRON, True),
    ("dense", 2, {"dp": 2, "recompute": "selective", "budget": 40_000} | MEGATRON, False),
    ("odd", 4, {"dp": 4, "micro": 1} | MEGATRON, False),
    ("dense, not tied", 4, {"tp": 2, "dp": 2, "sp": True, "micro": 1} | MEGATRON, False),
    ("experts", 4, {"cp": 2, "dp": 2} | MEGATRON, False),
    ("dense, not tied", 2, {"dp": 2, "bucket": 2000} | MEGATRON, False),
    # A teacher of another tp: its ranks are those of several student replicas.
    ("dense, not tied", 2, {"dp": 2, "teacher_tp": 2, "teacher_sp": True, "targets": "whole"}, False),
    ("latent", 2, {"dp": 2, "teacher_tp": 2, "targets": "sampled", "budget": 40_000}, False),
    ("dense", 4, {"tp": 2, "dp": 2, "sp": True, "heads": 4, "teacher_tp": 4, "teacher_sp": False}, False),
    ("dense, not tied", 4, {"tp": 2, "dp": 2, "sp": True, "heads": 4, "teacher_tp": 4, "targets": "whole"}, False),
    ("expert teacher", 4, {"pp": 2, "dp": 2, "teacher_tp": 2, "teacher_sp": True}, False),
    ("dense, not tied", 4, {"pp": 2, "vpp": 2, "dp": 2, "micro": 1, "teacher_tp": 2, "teacher_last": 3}, False),
    ("dense", 4, {"dp": 4, "micro": 1, "teacher_tp": 2, "fsdp": "both", "offload": True}, False),
    # Gradients reduced in buckets during the backward, as on GPUs.
    ("dense", 4, {"pp": 2, "dp": 2, "bucket": 2000}, False),
    ("dense, not tied", 2, {"dp": 2, "bucket": 2000}, False),
    ("dense, not tied", 4, {"tp": 2, "dp": 2, "sp": True, "bucket": 2000, "budget": 40_000}, False),
    ("experts", 4, {"pp": 2, "dp": 2, "ep": 2, "bucket": 2000, "budget": 40_000}, False),
    ("dense", 4, {"pp": 2, "vpp": 2, "dp": 2, "micro": 1, "bucket": 2000}, False),
    ("dense", 4, {"cp": 2, "dp": 2, "bucket": 2000}, False),
]


def train(rank, ranks, models, axes, cache=None, record=False, run_dir=None, steps=STEPS):
    """The numbers of some steps.

    Args:
        record: write what the teacher says to `cache`, which otherwise is read if given.
        run_dir: continue from a checkpoint there, or write one at the end if there is none.
    """
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.training.checkpointing import Saver

    size, bucket = axes.get("micro", 2), axes.get("bucket")
    cut = {axis: axes.get(axis, 1) for axis in ("cp", "ep")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(small.in_buckets(bucket))
        groups = stack.enter_context(small.layout(axes.get("tp", 1), axes.get("pp", 1), **cut))
        assert groups.dp.size() == axes.get("dp", 1)
        student, teacher = ({"num_query_groups": axes.get("heads", 2)} | section for section in MODELS[models])
        changes = changes_of(axes) | (ROUTING if "moe" in student else {}) | {"run__dir": str(run_dir)}
        config = small.config(student__model=small.student_section(**student), **changes)
        wider = stack.enter_context(small.wider_teacher(config, groups))
        run = small.student_step(config, groups, teacher_changes=teacher, wider=wider, **student)
        batches = [small.batch(step % 2, groups, size) for step in range(STEPS)]
        if record:
            curves.record(run.teacher, batches, cache)
        elif cache:
            run.teacher = curves.read(cache, run.teacher)
        progress = continue_from(run_dir, run)
        done = range(progress.step, steps)
        metrics = [run(batches[step], step=step + 1, measure=True) for step in done]
        if run_dir and not progress.step:
            progress.step = steps
            Saver(config, run, config.student.model, tokenizer=None).save(progress, {})
    return [{name: m[name] for name in m if name != "lr"} for m in metrics]


def changes_of(axes):
    """Keys of a config for what is said of a layout in LAYOUTS."""
    changes = {f"parallel__{name}": axes[name] for name in PARALLEL if name in axes}
    changes |= {key: axes[name] for name, key in OTHERS.items() if name in axes}
    if axes.get("targets") == "sampled":
        changes["loss__draws"] = 8
    for name, value in axes.items():
        whose, _, what = name.partition("_")
        if what in ("first", "last"):
            changes.setdefault(f"{whose}__pipeline", {})[f"{what}_stage_layers"] = value
        elif what and name not in PARALLEL:
            changes.setdefault("teacher__parallel", {})[what] = value
    return changes


def continue_from(run_dir, run):
    from megakd.checkpoints.folder import read_checkpoint
    from megakd.training.checkpointing import Progress, resume

    if run_dir is None or not (run_dir / "checkpoints").exists():
        return Progress()
    return resume(run, read_checkpoint(run_dir))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """(curve, recording) of one rank that takes the batch in one piece."""

    @functools.cache
    def run(models, heads, targets="top_k"):
        cache = tmp_path_factory.mktemp("recorded") / "cache" if targets == "top_k" else None
        axes = {"micro": 8, "heads": heads, "targets": targets}
        return run_ranks(1, train, models, axes, cache, cache is not None)[0], cache

    return run


def names(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(("models", "ranks", "axes", "recorded"), LAYOUTS, ids=names)
def test_a_layout_trains_as_one_rank_does(one_rank, models, ranks, axes, recorded):
    want, cache = one_rank(models, axes.get("heads", 2), axes.get("targets", "top_k"))
    got = run_ranks(ranks, train, models, axes, cache if recorded else None)
    assert all(curve == got[0] for curve in got), "the ranks report different numbers"
    assert_same(got[0], want)


def assert_same(got, want):
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a == pytest.approx(b, rel=TOLERANCE, abs=1e-6), f"step {step + 1} of these"


@pytest.mark.parametrize("models", MODELS)
def test_the_curve_moves(one_rank, models):
    losses = [m["loss"] for m in one_rank(models, 2)[0]]
    assert losses[-1] < 0.97 * losses[0] and len(set(losses)) == STEPS


# (models, ranks and layout that write a checkpoint after two steps, those that go on from it)
CONTINUED = [
    ("dense", (4, {"tp": 2, "pp": 2, "sp": True}), [(1, {}), (2, {"dp": 2}), (4, {"pp": 4, "micro": 1})]),
    (
        "experts",
        (2, {"ep": 2, "dp": 2}),
        [(1, {}), (2, {"tp": 2, "sp": True}), (4, {"pp": 2, "dp": 2, "ep": 2})],
    ),
    ("dense", (2, {"cp": 2}), [(1, {}), (2, {"tp": 2})]),
    ("dense", (2, {"pp": 2}), [(2, {"cp": 2}), (2, {"pp": 2, "vpp": 2})]),
    ("experts", (2, {"pp": 2, "vpp": 2}), [(1, {}), (4, {"pp": 2, "ep": 2, "dp": 2}), (2, {"pp": 2, "vpp": 2})]),
    ("experts", (4, {"pp": 2, "dp": 2, "ep": 2, "student_first": 1}), [(1, {})]),
    ("dense", (2, {"pp": 2, "student_first": 1}), [(2, {"tp": 2}), (2, {"pp": 2, "student_last": 1})]),
    ("odd", (4, {"dp": 4, "fsdp": "both", "micro": 1}), [(1, {}), (2, {"dp": 2, "fsdp": "both"})]),
    ("dense", (2, {"dp": 2, "fsdp": "both"}), [(2, {"pp": 2}), (4, {"tp": 2, "dp": 2, "sp": True, "fsdp": "both"})]),
    ("experts", (2, {"pp": 2}), [(2, {"dp": 2, "fsdp": "both"}), (2, {"dp": 2} | MEGATRON)]),
    ("odd", (4, {"dp": 4, "micro": 1} | MEGATRON), [(1, {}), (2, {"dp": 2} | MEGATRON)]),
    ("dense", (4, {"tp": 2, "dp": 2} | MEGATRON), [(2, {"dp": 2, "fsdp": "both"}), (2, {"dp": 2} | MEGATRON)]),
    ("experts, biases", (1, {}), [(2, {"ep": 2, "dp": 2}), (2, {"tp": 2, "sp": True, "ep": 2})]),
]


@pytest.mark.parametrize(("models", "writer", "readers"), CONTINUED, ids=lambda value: names(value)[:40])
def test_a_checkpoint_of_one_layout_continues_at_another(one_rank, tmp_path, models, writer, readers):
    want, _ = one_rank(models, 2)
    written = run_ranks(writer[0], train, models, writer[1], None, False, tmp_path, 2)[0]
    assert_same(written, want[:2])
    for ranks, axes in readers:
        got = run_ranks(ranks, train, models, axes, None, False, tmp_path)[0]
        assert_same(got, want[2:])
