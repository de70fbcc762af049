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


def grouped(rank, ranks):
    """(source, index) of each micro-batch of each rank, of a blend whose second part has the second teacher."""
    import torch

    with small.layout() as groups:
        from megakd.assembly.setup import Setup
        from megakd.assembly.taught import Taught
        from megakd.data.blend import BlendedDataset

        class Part:
            sequence_length, counts = small.SEQUENCE, {}

            def __init__(self, first):
                self.first = first

            def __len__(self):
                return 50

            def length(self, epoch, index):
                return small.SEQUENCE

            def sample(self, epoch, index):
                ids = np.arange(small.SEQUENCE) + self.first
                return {"ids": ids, "labels": ids + 1, "segments": [small.SEQUENCE]}

        data, config = BlendedDataset([Part(0), Part(500)], [0.5, 0.5], 1), small.config(train__micro_batch_size=2)
        unused = [None] * 3
        setup = Setup(config, torch.device("cpu"), groups, *unused, None, None, None, None, data, None)
        plain = [micro_batch.ids_BS[:, 0].tolist() for micro_batch in setup.batch(0)]
        setup.taught = Taught((0, 1), ())
        found = [(micro_batch.ids_BS[:, 0].tolist(), micro_batch.teachers) for micro_batch in setup.batch(0)]
        assert [len(part) for part in setup.samples(0)] == [2] * len(found)
        (filled,) = setup.load(data, [(0, 1), None, None, None][:2] * ranks, packed=False)
        assert filled.teachers[1] == -1 and filled.teachers_T.tolist() == [filled.teachers[0]] * small.SEQUENCE
        (packed,) = setup.load(data, [(0, 1), (0, 2)] * ranks, packed=True)
        assert len(packed.parts()) == len(packed.teachers) == 2 and (packed.teachers_T >= 0).all()
        return plain, found


def test_samples_of_one_teacher_stand_side_by_side_and_say_whose_they_are():
    for plain, found in run_ranks(2, grouped):
        assert sorted(first for firsts in plain for first in firsts) == sorted(
            first for firsts, _ in found for first in firsts
        ), "the same samples"
        assert all(teachers == tuple(int(first >= 500) for first in firsts) for firsts, teachers in found)
        assert sum(len(set(teachers)) > 1 for _, teachers in found) <= 1
        assert any(len({first >= 500 for first in firsts}) > 1 for firsts in plain), "as they come they are mixed"
