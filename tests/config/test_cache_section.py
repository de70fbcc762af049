import pytest

from megakd.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"teacher.allow_weak": True}, "teacher.checkpoint: neither checkpoint nor cache is given"),
        ({"cache.mode": "top_p"}, "cache.top_p: missing; only mode top_p has it"),
        ({"cache.top_p": 0.9}, "cache.top_p: 0.9; only mode top_p has it"),
        ({"cache.mode": "hybrid"}, "cache.draws: missing; only the modes sampled and hybrid"),
        ({"cache.draws": 8}, "cache.draws: 8; only the modes"),
        (
            {"cache.mode": "sampled", "cache.draws": 8, "cache.temperatures": [1.0, 2.0]},
            "cache.temperatures: [1.0, 2.0]",
        ),
        ({"cache.temperatures": [2.0, 2.0]}, "cache.temperatures: [2.0, 2.0] names one twice"),
        ({"cache.mode": "sampled", "cache.draws": 8, "cache.keep_label": True}, "cache.keep_label: true, but mode"),
        ({"cache.start": 8, "cache.end": 8}, "cache.end: 8 must be above start = 8"),
        ({"cache.codec": "bf16"}, "cache.codec: bf16; expected fp32, fp16 or q8 with mode top_k"),
        ({"cache.mode": "hidden", "cache.codec": "fp16"}, "cache.codec: fp16; expected fp32, bf16 or q8 with mode"),
        ({"cache.mode": "hidden", "cache.top_k": 5}, "cache.top_k: 5 has no effect with mode hidden"),
        ({"cache.mode": "hidden", "cache.temperatures": [2.0]}, "cache.temperatures: [2.0] has no effect with mode"),
        ({"cache.mode": "hidden", "cache.keep_label": True}, "cache.keep_label: True has no effect with mode hidden"),
        ({"cache.share": "4/4"}, "cache.share: '4/4'; expected I/N with I from 0 to N - 1"),
        ({"cache.share": "a third"}, "cache.share: 'a third'; expected I/N"),
        ({"cache.share": "0/4", "cache.start": 8}, "cache.share: 0/4 and start or end"),
    ],
)
def test_what_cannot_be_recorded_is_named(build, changes, problem):
    with pytest.raises(ConfigError) as caught:
        build(changes)
    assert f"here.yaml: {problem}" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher.cache": "cache"},
        {"teacher.cache": "cache", "teacher.checkpoint": "teacher", "cache.temperatures": [1.0, 2.0]},
        {"teacher.cache": "cache", "cache.mode": "hidden", "cache.codec": "q8", "loss.targets": "whole"},
        {"teacher.cache": "cache", "cache.mode": "hybrid", "cache.draws": 8, "cache.top_k": 4, "cache.start": 5},
    ],
)
def test_what_can_be_recorded(build, changes):
    assert build(changes).teacher.cache == "cache"


def test_shares_are_all_samples_each_once(build):
    for samples, shares in ((48, 3), (10, 4), (3, 5), (0, 2)):
        bounds = [build({"cache.share": f"{i}/{shares}"}).cache.bounds(samples) for i in range(shares)]
        assert [number for start, end in bounds for number in range(start, end)] == list(range(samples))
