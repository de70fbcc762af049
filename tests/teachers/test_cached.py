"""Lessons from a cache: which rows, in which order, read ahead or not; and what is said of a sample that is missing."""

import pytest

from tests.ranks import run_ranks

DATA = {"train": "corpus", "sequence_length": 23, "seed": 1}


def call(rank, ranks, name, *arguments):
    from megakd.megatron_on_cpu import install

    install("cpu")
    from tests.teachers import cached_teacher

    getattr(cached_teacher, name)(*arguments)


@pytest.mark.parametrize("ahead", [False, True])
def test_lessons_are_the_rows_of_the_samples_in_the_order_of_the_loss(tmp_path, ahead):
    run_ranks(1, call, "lessons_are_the_rows_of_the_samples_in_the_order_of_the_loss", tmp_path, ahead)


@pytest.mark.parametrize(
    "name",
    [
        "a_step_without_supervised_tokens_is_an_empty_lesson",
        "only_the_last_pipeline_stage_reads",
        "what_fails_while_it_is_read_ahead_is_raised_where_it_is_needed",
        "steps_that_were_left_out_do_not_pile_up",
        "several_caches_are_one_that_holds_all_of_them",
    ],
)
def test_reading(tmp_path, name):
    run_ranks(1, call, name, tmp_path)


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (DATA | {"seed": 5}, "seed 5 was recorded, this run has 1"),
        (
            {"merged": [DATA | {"seed": 5}, {"merged": [DATA | {"seed": 6, "train": "x"}]}]},
            "seed 5 and 6 was recorded, this run has 1",
        ),
        ({"merged": [DATA | {"start": 0}, DATA | {"start": 5}]}, "data, sequence length and seed are those"),
        ({"imported": [["a", 1]], "lines": 3}, "imported samples are found whole"),
        (DATA, "which covers other samples of them (train.steps, eval.samples, cache.start, cache.end, cache.share)"),
    ],
)
def test_why_a_sample_is_not_there(recorded, words):
    run_ranks(1, call, "why_a_sample_is_not_there", recorded, words)
