"""Layouts that cannot be are refused before any rank allocates, with the nearest that can."""

import pytest

from megakd.config import Model, Parallel, Pipeline, check_experts, check_model, check_ranks
from megakd.config.fit import model_problems, nearest_divisors, stages_of
from megakd.errors import ConfigError
from tests.training import small

MOE = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 13}


def problems(parallel, pipeline=None, trained=True, **changes):
    """(key, text) of a section at a layout."""
    model = Model.model_validate(small.student_section(**changes))
    pipeline = Pipeline.model_validate(pipeline or {})
    return dict(model_problems(model, Parallel(**parallel), small.SEQUENCE, pipeline, trained=trained))


def test_experts_divide_over_their_ranks_and_are_whole_there():
    assert problems({"ep": 4}, moe=MOE) == {"moe.num_experts": "6 is not divisible by parallel.ep = 4; expected 3 or 6"}
    assert not problems({"ep": 3, "tp": 2, "sp": True}, moe=MOE)
    assert list(problems({"tp": 2, "sp": True}, moe=MOE)) == ["moe.ffn_hidden_size"]


def test_expert_ranks_are_ranks_of_a_stage():
    config = small.config(pp=2, parallel__ep=4, student__model=small.student_section(moe=MOE | {"num_experts": 8}))
    assert check_ranks(config, 8) == 4
    with pytest.raises(ConfigError, match=r"parallel.ep 4 does not divide the 2 ranks of a pipeline stage") as error:
        check_ranks(config, 4)
    assert "set parallel.ep to 2," in str(error.value)


def test_expert_parallel_needs_experts_somewhere():
    dense, experts = (Model.model_validate(small.student_section(moe=moe)) for moe in (None, MOE))
    config = small.config(parallel__ep=2)
    check_experts(config, dense, experts)
    check_experts(config, experts, None)
    for teacher in (None, dense):
        with pytest.raises(ConfigError, match=r"parallel\.ep is 2, but"):
            check_experts(config, dense, teacher)


def test_nearest_divisors():
    assert [nearest_divisors(12, n) for n in (1, 5, 12, 20)] == [[1, 2], [4, 6], [12], [12]]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"pp": 2, "parallel__fsdp": "both"},
            r"parallel\.fsdp: both, but parallel\.pp = 2 .* expected teacher, or pp = 1",
        ),
        ({"parallel__ep": 2, "parallel__fsdp": "teacher"}, r"parallel\.fsdp: teacher, but parallel\.ep = 2 "),
        (
            {"parallel__fsdp": "teacher", "parallel__fsdp_by": "megatron"},
            r"parallel\.fsdp_by: megatron, but parallel\.fsdp is teacher, .* expected torch, or parallel\.fsdp = both",
        ),
        ({"optimizer__distributed": False, "parallel__fsdp": "both"}, r"optimizer\.distributed: false, but"),
        ({"tp": 2, "teacher__parallel": {"tp": 3}}, r"teacher\.parallel\.tp: 3 is no multiple .* expected 4"),
        ({"tp": 4, "teacher__parallel": {"tp": 2}}, r"teacher\.parallel\.tp: 2 is no multiple .* expected 4"),
        (
            {"parallel__cp": 2, "teacher__parallel": {"tp": 2}},
            r"teacher\.parallel\.tp: 2, but parallel\.cp = 2 .* expected 1, or cp = 1",
        ),
        ({"parallel__ep": 2, "teacher__parallel": {"tp": 2}}, r"2, but parallel\.ep = 2 .* expected 1, or ep = 1"),
        (
            {"teacher__cache": "unused", "teacher__parallel": {"tp": 2}},
            r"teacher\.parallel: given with teacher\.cache, .* expected null, and parallel\.tp = 2 to record",
        ),
        ({"teacher__parallel": {"tp": 1, "sp": True}}, r"teacher\.parallel\.sp: true, but teacher\.parallel\.tp is 1"),
        (
            {"teacher__parallel": {"tp": 2, "sp": True}, "data__sequence_length": 15},
            r"15 is not divisible by teacher\.parallel\.tp = 2, .* expected 16, or teacher\.parallel\.sp = false",
        ),
        (
            {"teacher__parallel": {"tp": 2}, "features__student_layers": [1], "features__teacher_layers": [1]},
            r"features: given with teacher\.parallel\.tp = 2",
        ),
        ({"teacher__cache": "unused", "teacher__offload": True}, r"teacher\.offload: true, but what is in a cache"),
        ({"parallel__vpp": 2}, r"parallel\.vpp: 2, but parallel\.pp is 1"),
        ({"parallel__cp": 3}, r"sequence_length: 16 is not divisible by 2 x parallel\.cp = 6; expected 18"),
        (
            {"parallel__cp": 2, "tp": 2, "parallel__sp": True, "data__sequence_length": 12},
            r"12 is not divisible by 2 x parallel\.cp = 4 x parallel\.tp = 2; expected 16",
        ),
        ({"parallel__cp": 2, "data__packing": True}, r"data\.packing: true, but parallel\.cp = 2"),
        (
            {"pp": 2, "parallel__vpp": 3},
            r"num_layers: 2 is not divisible by parallel\.pp = 2 x parallel\.vpp = 3; 2 stages would do",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        small.config(**changes)


def test_a_teacher_takes_the_ranks_of_whole_student_replicas():
    config = small.config(tp=2, teacher__parallel={"tp": 8}, train__global_batch_size=12)
    assert check_ranks(config, 8) == 4
    for ranks, nearest in ((12, 4), (6, 2)):
        with pytest.raises(ConfigError, match=r"tp 8 takes the ranks of 4 student replicas, and") as error:
            check_ranks(config, ranks)
        assert f"start a multiple of 8 ranks, or set teacher.parallel.tp to {nearest}" in str(error.value)


def test_a_teacher_is_checked_at_its_own_tp():
    config = small.config(tp=2, teacher__parallel={"tp": 4})
    latent = {"kv_lora_rank": 12, "qk_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    odd, unsplit = (
        Model.model_validate(small.teacher_section(**changes))
        for changes in ({"num_query_groups": 2}, {"num_query_groups": 4, "mla": latent})
    )
    check_model(config, odd, "the student")
    with pytest.raises(ConfigError, match=r"num_query_groups: 2 is not divisible by teacher\.parallel\.tp = 4"):
        check_model(config, odd, "teacher", beside=True)
    with pytest.raises(ConfigError, match=r"mla\.q_lora_rank: null, but Megatron-Core .* parallel\.tp = 2 alone"):
        check_model(config, unsplit, "teacher", beside=True)
    of_four = small.student_section(num_query_groups=4)
    check_model(small.config(tp=4, student__model=of_four), unsplit, "teacher", beside=True)


def test_interleaved_stages_take_whole_rounds_of_micro_batches():
    section = small.student_section(num_layers=4)
    config = small.config(pp=2, parallel__vpp=2, student__model=section, train__global_batch_size=6)
    assert check_ranks(config, 2) == 1
    with pytest.raises(ConfigError, match=r"gives each of 2 data parallel ranks 3 micro-batches") as error:
        check_ranks(config, 4)
    assert "set train.global_batch_size to 8," in str(error.value)


def test_context_parallel_ranks_belong_to_one_model():
    config = small.config(tp=2, parallel__cp=2)
    assert check_ranks(config, 8) == 2
    with pytest.raises(ConfigError, match=r"parallel.tp 2 x parallel.pp 1 x parallel.cp 2 = 4 ranks each"):
        check_ranks(config, 6)


@pytest.mark.parametrize(
    ("parallel", "pipeline", "text"),
    [
        ({"pp": 1}, {"first_stage_layers": 1}, "1, but parallel.pp is 1"),
        ({"pp": 2, "vpp": 2}, {"first_stage_layers": 2}, "2 with parallel.vpp = 2"),
        ({"pp": 2}, {"first_stage_layers": 2, "last_stage_layers": 3}, "= 3 are not the model's 6 layers"),
        ({"pp": 3}, {"first_stage_layers": 1}, "leave 5 of 6 layers for the other 2 stages; expected a multiple of 2"),
        ({"pp": 2}, {"first_stage_layers": 6}, "leave 0 of 6 layers for the other 1 stages"),
    ],
)
def test_uneven_stages_must_add_up(parallel, pipeline, text):
    ((key, said),) = problems(parallel, pipeline, num_layers=6).items()
    assert key == "student.pipeline.first_stage_layers" and text in said


def test_a_split_of_layers():
    assert stages_of(6, 3, Pipeline()) == [0, 0, 1, 1, 2, 2]
    assert stages_of(6, 3, Pipeline(first_stage_layers=1, last_stage_layers=3)) == [0, 1, 1, 2, 2, 2]
    assert stages_of(5, 2, Pipeline(last_stage_layers=1)) == [0, 0, 0, 0, 1]
    assert not problems({"pp": 2, "vpp": 4}, num_layers=2, trained=False), "a teacher is not interleaved"
