"""Packed samples are trained on exactly as they are one by one: losses, gradients, and what a cache calls them."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import small

LENGTHS = [3, 11, 1, 7, 5, 13]


def loaded(packed):
    """What load_batch returns for six samples: two rows of three, or six rows of one; some tokens unsupervised."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, small.VOCAB, (n + 1,), generator=generator) for n in LENGTHS]
    labels = [text[1:].clone() for text in texts]
    labels[1][:4] = -100
    labels[2][:] = -100
    rows = [[0, 1, 2], [3, 4, 5]] if packed else [[n] for n in range(6)]
    length = 27 if packed else 13
    batch = {"ids": [], "labels": [], "segments": [], "lengths": []}
    for row in rows:
        used = sum(LENGTHS[n] for n in row)
        fill = length - used
        batch["ids"].append(torch.cat([texts[n][:-1] for n in row] + [torch.zeros(fill, dtype=torch.int64)]))
        batch["labels"].append(torch.cat([labels[n] for n in row] + [torch.full((fill,), -100)]))
        sizes = [LENGTHS[n] for n in row]
        batch["segments"].append([*sizes[:-1], sizes[-1] + fill])
        batch["lengths"].append(used)
    return batch | {name: torch.stack(batch[name]) for name in ("ids", "labels")}


def step(rank, ranks, packed, tp, pp, changes, student):
    config = small.config(tp, pp, **changes)
    with small.layout(tp, pp) as groups, small.wider_teacher(config, groups) as wider:
        from megakd.models.micro_batch import build_micro_batch

        run = small.student_step(config, groups, wider=wider, teacher_changes=student, **student)
        mine = {name: rows[groups.dp.rank() :: groups.dp.size()] for name, rows in loaded(packed).items()}
        batch = build_micro_batch(mine, packed=packed)
        return [run([batch], step=n + 1, measure=True) for n in range(2)], batch.parts()


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "changes", "student"),
    [
        (1, 1, 1, {}, {}),
        (1, 1, 1, {}, {"position_embedding": "learned_absolute"}),
        (1, 1, 1, {"train__recompute": "full"}, {}),
        (2, 2, 1, {"parallel__sp": True}, {}),
        (2, 1, 2, {}, {}),
        (2, 1, 1, {"teacher__parallel": {"tp": 2}}, {"position_embedding": "learned_absolute"}),
    ],
)
def test_packing_changes_no_loss_and_no_gradient(ranks, tp, pp, changes, student):
    packed, parts = run_ranks(ranks, step, True, tp, pp, changes, student)[0]
    plain, _ = run_ranks(1, step, False, 1, 1, {}, student)[0]
    assert plain[0]["tokens"] == sum(LENGTHS) - 4 - 1
    for a, b in zip(packed, plain, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)
    assert [stop - start for _, start, stop in parts] == (LENGTHS[:3] if "teacher__parallel" in changes else LENGTHS)


def places(rank, ranks):
    with small.layout():
        from megakd.models.micro_batch import build_micro_batch

        one, packed = (build_micro_batch(loaded(flag), packed=flag) for flag in (False, True))
        texts = [[m.ids_BS[row, start:stop].tolist() for row, start, stop in m.parts()] for m in (one, packed)]
        try:
            build_micro_batch(loaded(True), packed=False)
        except AssertionError as error:
            return texts, packed.position_ids_BS[0, :16].tolist(), str(error)


def test_samples_keep_their_places():
    (one, packed), positions, refusal = run_ranks(1, places)[0]
    assert one == packed and [len(text) for text in one] == LENGTHS
    assert positions == [0, 1, 2, *range(11), 0, 1]
    assert "must be packed" in refusal
