"""What a step's witness keeps: every sample with its tokens, and norms that make up Megatron's."""

import math
import types

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.training import small
from tests.training.test_packing import LENGTHS, loaded

EXPERTS = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16}}


def parts_of(run, groups, batches, samples):
    from megakd.training.witness import StepWitness

    witness = StepWitness(run.gpt, groups, batches, samples)
    metrics = run(batches, step=1, measure=True, witness=witness)
    return witness.part(), metrics


def packed_or_not(rank, ranks, packed):
    with small.layout() as groups:
        from megakd.models.micro_batch import build_micro_batch

        batches = [build_micro_batch(loaded(packed), packed=packed)]
        rows = [[(0, n) for n in range(2 if packed else 6)]]
        return parts_of(small.student_step(small.config(), groups), groups, batches, rows)


def test_packed_samples_are_kept_as_they_are_one_by_one():
    (packed, _), (plain, metrics) = (run_ranks(1, packed_or_not, flag)[0] for flag in (True, False))
    assert packed.arrays["length"].tolist() == plain.arrays["length"].tolist() == LENGTHS
    assert packed.arrays["place"].tolist() == [0, 0, 0, 1, 1, 1] and plain.arrays["place"].tolist() == list(range(6))
    assert packed.arrays["part"].tolist() == [0, 1, 2] * 2 and packed.arrays["index"].tolist() == [0] * 3 + [1] * 3
    for name in ("ids", "labels", "entries", "target_ids"):
        assert np.array_equal(packed.arrays[name], plain.arrays[name]), name
    for name in ("loss", "kd", "ce", "label_logprob", "log_tail", "target_logprobs"):
        assert packed.arrays[name] == pytest.approx(plain.arrays[name], abs=2e-5), name
    for name in ("loss", "kd", "ce"):
        assert plain.arrays[name].mean(dtype=np.float64) == pytest.approx(metrics[name], rel=1e-6)
    assert -plain.arrays["label_logprob"].mean() == pytest.approx(metrics["teacher_ce"], rel=1e-6)


def witnessed(rank, ranks, tp, pp, changes, student):
    with small.layout(tp, pp) as groups:
        run = small.student_step(small.config(tp, pp, **changes), groups, **student)
        batches = small.batch(0, groups, 2)
        return parts_of(run, groups, batches, [[(0, 0), (0, 0)] for _ in batches])


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "changes", "student"),
    [
        (1, 1, 1, {}, {}),
        (2, 2, 1, {"parallel__sp": True}, {}),
        (2, 1, 1, {"parallel__fsdp": "both"}, {}),
        (4, 2, 1, {"parallel__fsdp": "both", "parallel__fsdp_by": "megatron"}, {}),
        (4, 2, 1, {"parallel__sp": True, "parallel__fsdp": "both"}, {"tie_embeddings": False}),
        (2, 2, 1, {}, {"tie_embeddings": False, "add_bias_linear": True}),
        (2, 1, 2, {}, {"tie_embeddings": True}),
        (2, 1, 1, {}, {}),
        (2, 1, 1, {"optimizer__distributed": False}, {}),
        (4, 2, 1, {"optimizer__clip_grad": 0.01}, {}),
        (2, 2, 1, {"parallel__sp": True}, EXPERTS),
        (2, 1, 1, {}, EXPERTS),
    ],
)
def test_the_norms_make_up_megatrons(ranks, tp, pp, changes, student):
    """Whatever is split, copied or shared is counted once, and nothing is clipped before."""
    from megakd.steps.whole import join_gradients

    answers, conflicts = run_ranks(ranks, witnessed, tp, pp, changes, student), []
    norms = join_gradients({rank: part for rank, (part, _) in enumerate(answers)}, conflicts)
    assert math.hypot(*norms.values()) == pytest.approx(answers[0][1]["grad_norm"], rel=1e-5) and not conflicts
    one = run_ranks(1, witnessed, 1, 1, {}, student)[0][0]
    want = dict(zip((name for name, _ in one.parameters), np.sqrt(one.arrays["squares"]).tolist(), strict=True))
    assert norms == pytest.approx(want, rel=2e-4, abs=1e-7)


def test_a_norm_that_transformer_engine_fuses_has_one_name():
    """What Megatron's local layers call input_layernorm is a part of the projection there, and in checkpoints."""
    from megakd.models.initialization import shared_name

    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    layer = types.SimpleNamespace(
        layer_number=4, submodules_config=types.SimpleNamespace(sharded_state_dict_keys_map=keys)
    )
    model = types.SimpleNamespace(
        decoder=types.SimpleNamespace(layers=[layer]), share_embeddings_and_output_weights=False
    )
    names = {name: shared_name(model, f"decoder.layers.0.{name}") for name in ("input_layernorm.weight", "mlp.a")}
    assert names["input_layernorm.weight"] == "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    assert names["mlp.a"] == "decoder.layers.3.mlp.a"
    assert shared_name(model, "decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
