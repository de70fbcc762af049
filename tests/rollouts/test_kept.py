"""What a run keeps of its completions: any text comes back, and only what was written as the run would now."""

import pytest

from megakd.rollouts.kept import Kept
from megakd.rollouts.rollouts import settings_of
from tests.training.small import config


def line(number, text="a", **changes):
    entry = {"step": 1, "weights_step": 0, "settings": "s", "prompt_number": number, "completion_number": 0}
    entry |= {"prompt": text, "completion": text, "prompt_ids": [7], "completion_ids": [8, 9]}
    return entry | {"logprobs": [-1.0, -2.0], "finish_reason": "stop"} | changes


def test_every_end_of_line_that_a_text_may_hold_comes_back(tmp_path):
    kept = Kept(str(tmp_path))
    texts = ["a\u2028b", "\u0085", "c\x1cd\r\ne", "\x0b\x0c"]
    kept.write(0, [line(number, text) for number, text in enumerate(texts)])
    found = kept.read(0)
    assert [rollout.prompt for rollout in found[0]] == [0, 1, 2, 3] and found[0][0].logprob == -3.0


def test_a_damaged_file_is_left_out_and_named(tmp_path, caplog):
    kept = Kept(str(tmp_path))
    kept.write(0, [line(0)])
    path = kept.path(0)
    path.write_text(path.read_text()[:-9])
    assert kept.read(0) is None and "is damaged, and left out" in caplog.text
    assert kept.read(1) is None


@pytest.mark.parametrize(
    "change", [{"rollouts__temperature": 0.5}, {"rollouts__max_new_tokens": 3}, {"rollouts__n": 2}]
)
def test_how_completions_are_written_has_a_digest(change):
    usual = {"rollouts__prompts": "p", "rollouts__max_new_tokens": 4, "loss__ce_weight": 0.0}
    assert settings_of(config(**usual)) == settings_of(config(**usual | {"rollouts__concurrency": 3}))
    assert settings_of(config(**usual)) != settings_of(config(**usual | change))
