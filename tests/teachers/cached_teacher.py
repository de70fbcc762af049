"""What tests/teachers/test_cached.py checks, in a process that may load Megatron."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from megakd.cache import CacheReader, build_table
from megakd.errors import CacheError
from megakd.models.micro_batch import MicroBatch
from megakd.teachers.cached import CachedTeacher, why_missing
from tests.cache.made import CONTENTS, S, make_cache, make_header, make_row, make_sample

DATA = {"train": "corpus", "sequence_length": S, "seed": 1}


class Axis:
    def __init__(self, rank=0, size=1):
        self.rank, self.size = (lambda: rank), (lambda: size)


def teacher(*folders, pp=(0, 1), **options):
    return CachedTeacher([CacheReader(one, **options) for one in folders], types.SimpleNamespace(pp=Axis(*pp)), DATA)


def micro_batch(*numbers, padding=0) -> MicroBatch:
    """Made-up samples in rows, filled up; None is a row that fills up the batch, "masked" one that learns nothing."""
    ids_BS = torch.zeros(len(numbers), S + padding, dtype=torch.int64)
    labels_BS = torch.full_like(ids_BS, -100)
    for b, number in enumerate(numbers):
        if isinstance(number, int):
            ids, mask_S, last_label = make_sample(number)
            labels = np.where(mask_S, np.append(ids[1:], last_label), -100)
            ids_BS[b, :S], labels_BS[b, :S] = torch.from_numpy(ids), torch.from_numpy(labels)
    samples = tuple((b, 0, 0 if number is None else S) for b, number in enumerate(numbers))  # as `load_batch` has it
    return MicroBatch(ids_BS, labels_BS, None, samples)


def expected(*numbers):
    """(label, table row) of every supervised token, in the order of MicroBatch.rows_T: position first, then row."""
    tokens = []
    for b, number in enumerate(numbers):
        if isinstance(number, int):
            table, (_, mask_S, _) = build_table(make_row(number)), make_sample(number)
            tokens += [(position, b, table, t) for t, position in enumerate(np.flatnonzero(mask_S))]
    return [(table, t) for _, _, table, t in sorted(tokens, key=lambda token: token[:2])]


def lessons_are_the_rows_of_the_samples_in_the_order_of_the_loss(folder, ahead):
    make_cache(folder, range(8), per_part=3)
    source = teacher(folder)
    steps = [[micro_batch(3, 0), micro_batch(7, None, 3, "masked", padding=4)], [micro_batch(5, 5)]]
    numbers = [[(3, 0), (7, None, 3, "masked")], [(5, 5)]]
    for step, (micro_batches, wanted) in enumerate(zip(steps, numbers, strict=True)):
        if ahead:
            source.prefetch(micro_batches)
        for lesson, batch, want in zip(source.lessons(micro_batches), micro_batches, wanted, strict=True):
            rows = expected(*want)
            assert len(rows) == len(batch.labels_T) == lesson.targets.tokens, step
            assert lesson.targets.ids_TK.tolist() == [table.ids_TK[t].tolist() for table, t in rows]
            assert lesson.targets.log_tail_T.tolist() == [table.log_tail_T[t] for table, t in rows]
            assert lesson.label_logprob_T.tolist() == [table.label_logprob_T[t] for table, t in rows]
    assert not source.ahead


def a_step_without_supervised_tokens_is_an_empty_lesson(folder):
    make_cache(folder, range(2))
    for lesson in teacher(folder).lessons([micro_batch(None, None), micro_batch("masked", None)]):
        lesson.targets.check()
        assert lesson.targets.tokens == len(lesson.label_logprob_T) == len(lesson.id_T) == 0


def only_the_last_pipeline_stage_reads(folder):
    make_cache(folder, range(2))
    first = teacher(folder, pp=(0, 2))
    first.prefetch([micro_batch(99)])
    assert first.lessons([micro_batch(99)]) == [] and not first.ahead
    with pytest.raises(CacheError):
        teacher(folder, pp=(1, 2)).lessons([micro_batch(99)])


def what_fails_while_it_is_read_ahead_is_raised_where_it_is_needed(folder):
    make_cache(folder, range(4))
    source = teacher(folder)
    missing, there = [micro_batch(1), micro_batch(99)], [micro_batch(2)]
    source.prefetch(missing)
    source.prefetch(there)
    assert source.lessons(there)[0].targets.tokens == make_sample(2)[1].sum()
    with pytest.raises(CacheError, match="does not hold the sample that begins with ids"):
        source.lessons(missing)
    assert source.lessons([micro_batch(3)])[0].targets.tokens == make_sample(3)[1].sum()


def several_caches_are_one_that_holds_all_of_them(folder):
    for name, numbers in (("a", range(3)), ("b", range(3, 6)), ("c", range(2, 4)), ("ab", range(6))):
        make_cache(folder / name, numbers)
    batches = [micro_batch(4, 1), micro_batch(0), micro_batch("masked", None)]
    for got, want in zip(*(source.lessons(batches) for source in (teacher(folder / "a", folder / "b"),
                                                                  teacher(folder / "ab"))), strict=True):  # fmt: skip
        assert torch.equal(got.targets.ids_TK, want.targets.ids_TK) and torch.equal(got.id_T, want.id_T)
        assert torch.equal(got.targets.logprobs_TK, want.targets.logprobs_TK)
    with pytest.raises(CacheError, match=r"a does not hold the sample .*\n.*b does not hold the sample"):
        teacher(folder / "a", folder / "b").lessons([micro_batch(9)])
    with pytest.raises(CacheError, match=r"/a and .*/c both hold the sample that begins with ids .*: which teacher"):
        teacher(folder / "a", folder / "c").lessons([micro_batch(2)])


def steps_that_were_left_out_do_not_pile_up(folder):
    make_cache(folder, range(4))
    source = teacher(folder)
    steps = [[micro_batch(number)] for number in (0, 1, 2, 3)]
    for step in steps:
        source.prefetch(step)
    assert len(source.ahead) == 2
    for number, step in enumerate(steps):
        assert source.lessons(step)[0].targets.tokens == make_sample(number)[1].sum()


def why_a_sample_is_not_there(recorded, words):
    why = why_missing(dataclasses.replace(make_header(CONTENTS), data=recorded), DATA)
    assert words in why and ("was recorded" in why) == ("was recorded" in words), why
