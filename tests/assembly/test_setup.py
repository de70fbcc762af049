"""What a run loads for its steps."""

import numpy as np

from tests.ranks import run_ranks
from tests.training import small


def loads(rank, ranks):
    """(samples loaded before each step, steps read ahead) of a run of 3 steps of 8 samples with a cached teacher."""
    import torch

    with small.layout() as groups:
        from megakd.assembly.setup import Setup
        from megakd.teachers.cached import CachedTeacher

        loaded, ahead = [], []

        class Data:
            sequence_length = small.SEQUENCE

            def __len__(self):
                return 100

            def length(self, epoch, index):
                return small.SEQUENCE

            def sample(self, epoch, index):
                loaded.append((epoch, index))
                ids = np.arange(small.SEQUENCE)
                return {"ids": ids, "labels": ids + 1, "segments": [small.SEQUENCE]}

        class Teacher(CachedTeacher):
            def __init__(self):
                pass

            def prefetch(self, micro_batches):
                ahead.append(id(micro_batches))

        unused = [None] * 3
        setup = Setup(
            small.config(train__steps=3),
            torch.device("cpu"),
            groups,
            *unused,
            None,
            Teacher(),
            None,
            None,
            Data(),
            None,
        )
        given, counts = [], []
        for step in range(3):
            given.append(id(setup.batch(step)))
            counts.append(len(set(loaded)))
        assert len(loaded) == len(set(loaded)), "a sample was loaded twice"
        assert ahead == given[1:], "what is read ahead is not what the step is given"
        return counts


def test_a_cached_run_loads_one_step_ahead_and_nothing_beyond_its_last():
    assert run_ranks(1, loads) == [[16, 24, 24]]
