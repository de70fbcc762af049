from dataclasses import replace

import pytest
import torch

from megakd.targets import TeacherTargets

GOOD = TeacherTargets(
    torch.tensor([[3, 9, -1], [4, -1, 0]]),
    torch.tensor([[0.5, 0.25, 0.0], [0.125, 0.0, 0.5]]).log(),
    torch.tensor([0.25, 0.375]).log(),
)


def changed(row, slot, *, ids=None, logprobs=None):
    new = replace(GOOD, ids_TK=GOOD.ids_TK.clone(), logprobs_TK=GOOD.logprobs_TK.clone())
    if ids is not None:
        new.ids_TK[row, slot] = ids
    if logprobs is not None:
        new.logprobs_TK[row, slot] = logprobs
    return new


@pytest.mark.parametrize(
    "bad, message",
    [
        (changed(1, 0, ids=0), "an id twice in a row, first in row 1"),
        (changed(1, 0, ids=-2), "an id below -1, first in row 1"),
        (changed(0, 1, ids=-1), "an empty slot"),
        (changed(0, 1, logprobs=-torch.inf), "an id whose log-probability is -inf"),
        (changed(0, 1, logprobs=torch.nan), "NaN or above 0"),
        (changed(0, 1, logprobs=0.5), "NaN or above 0"),
        (changed(1, 0, logprobs=-0.1), "sum to more than 1, first in row 1"),
        (replace(GOOD, log_tail_T=torch.tensor([0.1, -9])), "a log_tail that is NaN or above 0"),
        (replace(GOOD, log_tail_T=GOOD.log_tail_T[:1]), r"log_tail \[T\]"),
        (replace(GOOD, ids_TK=GOOD.ids_TK.int()), "int64 ids"),
        (replace(GOOD, logprobs_TK=GOOD.logprobs_TK.half()), "float32 logprobs"),
        (replace(GOOD, temperature=0.0), "temperature must be"),
        (replace(GOOD, entropy_T=torch.zeros(3)), "entropy must be"),
        (replace(GOOD, entropy_T=torch.tensor([1.0, torch.nan])), "an entropy"),
    ],
)
def test_check_refuses_what_is_not_so(bad, message):
    with pytest.raises(ValueError, match=message):
        bad.check()


def test_check_accepts_what_is_so():
    GOOD.check()
    GOOD.rows(slice(0, 1)).check()
    replace(GOOD, entropy_T=torch.tensor([1.0, 2.0])).check()
    GOOD.rows(slice(0, 0)).check()
    one_rank = replace(GOOD, ids_TK=torch.full((2, 3), -1), logprobs_TK=torch.full((2, 3), -torch.inf))
    one_rank.check()


def test_rows_takes_some_tokens_of_every_part():
    some = replace(GOOD, entropy_T=torch.tensor([1.0, 2.0])).rows(torch.tensor([False, True]))
    assert some.ids_TK.tolist() == [[4, -1, 0]] and some.entropy_T.tolist() == [2.0] and some.tokens == 1
