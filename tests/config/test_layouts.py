"""Layouts that cannot be are refused before any rank allocates, with the nearest that can."""

import pytest

from megakd.config import Model, check_experts, check_ranks
from megakd.config.fit import model_problems, nearest_divisors
from megakd.errors import ConfigError
from tests.training import small

MOE = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 13}


def problems(parallel, **changes):
    """(key, text) of a trained student's section at a layout."""
    config = small.config().parallel.model_copy(update=parallel)
    model = Model.model_validate(small.student_section(**changes))
    return dict(model_problems(model, config, small.SEQUENCE, trained=True))


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
