"""FSDP between steps and beside them: what a rank keeps, what is computed and saved; the curves are in test_axes.py."""

import sys

import pytest

from tests.ranks import run_ranks
from tests.training import small

FSDP = {"parallel__fsdp": "both"}
MEGATRON = FSDP | {"parallel__fsdp_by": "megatron"}
both = pytest.mark.parametrize("fsdp", [FSDP, MEGATRON], ids=["torch", "megatron"])


def shares(gpt):
    """(sharded weights / all of this rank's weights, elements kept / elements of the whole)."""
    from torch.distributed.tensor import DTensor

    from megakd.models.sharding import own

    parameters = list(gpt.parameters())
    kept = sum(own(p).numel() for p in parameters)
    return sum(isinstance(p, DTensor) for p in parameters) / len(parameters), kept / sum(p.numel() for p in parameters)


def held(rank, ranks, changes):
    """After a step, and after a validation by the whole distribution: shares of student and teacher."""
    with small.layout() as groups:
        from megakd.teachers.whole import WholeTeacher
        from megakd.training.evaluation import Evaluation

        config = small.config(**changes)
        run = small.student_step(config, groups)
        batch = small.batch(0, groups, 2)
        run(batch, step=1, measure=True)
        seen = [shares(run.gpt), shares(run.teacher.gpt)]
        run.teacher = WholeTeacher.of(run.teacher)
        judged = Evaluation(run.gpt, run.teacher, run.loss, groups)([batch], batch[0].ids_BS.device, lambda: False)
        seen.append(shares(run.gpt))
        after = run(batch, step=2, measure=True)
        return seen, {"judged": judged["ce"], "kl": judged["forward_kl"], "kl2": judged["reverse_kl"]} | after


@both
def test_between_steps_a_rank_has_its_part_alone_and_judges_as_a_whole_model_does(fsdp):
    (seen, got), _ = run_ranks(2, held, fsdp)
    for sharded, kept in seen:
        assert sharded == 1.0 and kept == pytest.approx(0.5, abs=0.01)
    (plain, want), _ = run_ranks(2, held, {})
    assert plain[0] == (0.0, 1.0)
    assert got == pytest.approx(want, rel=2e-5)


def in_bf16(rank, ranks, changes, folder):
    """Losses of two steps, the types of weights and moments, the type of the weights in a checkpoint of them, and
    whether the sums of gradients over the ranks are rounded to bfloat16."""
    with small.layout() as groups:
        import torch

        from megakd.checkpoints.folder import read_checkpoint
        from megakd.checkpoints.torch_dist_reader import TorchDistReader
        from megakd.training.checkpointing import Progress, Saver

        config = small.config(run__dir=str(folder), train__precision="bf16", **changes)
        run = small.student_step(config, groups)
        (ddp,), rounded = run.ddp, []
        finish = ddp.finish_grad_sync

        def look(*args, **kwargs):
            finish(*args, **kwargs)
            gradients = [part.main_grad for part in getattr(ddp, "parts", {}).values()]
            rounded.append(all(torch.equal(g, g.bfloat16().float()) for g in gradients))

        ddp.finish_grad_sync = look
        losses = [run(small.batch(i, groups, 4), step=i + 1, measure=False) for i in range(2)]
        Saver(config, run, config.student.model, tokenizer=None).save(Progress(step=2), {})
        reader = TorchDistReader(read_checkpoint(folder).path)
        kinds = {
            name: str(reader.entry(name).dtype)
            for name in ("embedding.word_embeddings.weight", "optimizer.state.param.embedding.word_embeddings.weight")
        }
        return losses, kinds, {str(p.dtype) for p in run.gpt.parameters()}, rounded


@both
def test_bf16_computes_in_it_and_keeps_float32(tmp_path, fsdp):
    losses, kinds, kept, rounded = run_ranks(2, in_bf16, fsdp, tmp_path / "fsdp")[0]
    assert rounded == [False, False], "what two ranks have in bfloat16 is added in float32"
    want, want_kinds, *_ = run_ranks(2, in_bf16, {}, tmp_path / "ddp")[0]
    assert kept == {"torch.float32"} and list(kinds.values()) == ["torch.bfloat16", "torch.float32"]
    assert kinds == want_kinds
    assert losses[0]["loss"] == want[0]["loss"], "the same weights in the same type"
    assert losses[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=1e-2)  # gradients were rounded to bf16
    assert losses[1]["loss"] == pytest.approx(want[1]["loss"], rel=1e-2)


def recorded(rank, ranks, changes):
    with small.layout() as groups:
        from megakd.recording.recorder import Recorder
        from megakd.teachers.entries import Recipe

        gpt = small.build(small.teacher_section(), small.config(**changes), groups, seed=2, teacher=True)
        recorder = Recorder(gpt, Recipe("top_k", 7, (1.0,), None, False, 0), groups, seed=1)
        return [
            (row.key, row.ids_N.tolist(), row.logprobs_N.tolist()) for row in recorder.rows(small.batch(0, groups, 2))
        ]


def test_a_sharded_teacher_records_the_same_rows():
    got, want = (run_ranks(2, recorded, changes) for changes in (FSDP, {}))
    assert all(got) and [[row[:2] for row in rows] for rows in got] == [[row[:2] for row in rows] for rows in want]
    for rows, others in zip(got, want, strict=True):
        for (_, _, a), (_, _, b) in zip(rows, others, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def random_states(rank, ranks):
    """Those that dropout of cut activations draws from, before and after a student is wrapped."""
    with small.layout(tp=2) as groups:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        from megakd.training.optimizer import wrap_data_parallel

        config = small.config(tp=2, **MEGATRON)
        gpt = small.build(small.student_section(), config, groups, seed=1)
        states = [get_cuda_rng_tracker().get_states()]
        wrap_data_parallel(gpt, config, groups)
        states.append(get_cuda_rng_tracker().get_states())
        return [{name: state.tolist() for name, state in one.items()} for one in states]


def test_megatron_fsdp_leaves_random_states_as_they_are():
    answers = run_ranks(4, random_states)
    assert all(before == after for before, after in answers)
    assert answers[0][0]["model-parallel-rng"] != answers[1][0]["model-parallel-rng"]


def test_without_einops_there_is_no_megatron_fsdp(monkeypatch):
    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.errors import ConfigError
    from megakd.training.megatron_fsdp import build_engine

    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ConfigError, match=r"needs einops.*\nhint: pip install"):
        build_engine(None, None)
