"""A teacher whose weights rest in host memory says the same, and they are on the device while it runs alone."""

import pytest

from tests.ranks import run_ranks
from tests.training import small

WHOLE = {"loss__targets": "whole"}


def taught(rank, ranks, tp, pp, offload, changes):
    """Metrics of two steps; elements of the teacher's weights on the device when built, while it runs and after."""
    with small.layout(tp, pp) as groups:
        changes = changes | ({"teacher__offload": True} if offload else {})
        run = small.student_step(small.config(tp, pp, **changes), groups)
        gpt, seen = run.teacher.gpt, []
        elements = lambda: sum(p.numel() for p in gpt.parameters())  # noqa: E731
        resting = run.teacher.offload
        whole = sum(copy.numel() for copy in resting.host.values()) if resting else elements()
        seen.append(elements() / whole)
        gpt.decoder.layers[0].register_forward_hook(lambda *_: seen.append(elements() / whole))
        metrics = []
        for step in range(2):
            metrics.append(run(small.batch(step, groups, 4), step=step + 1, measure=True))
            seen.append(elements() / whole)
        return metrics, seen


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "changes"), [(1, 1, 1, {}), (1, 1, 1, WHOLE), (2, 2, 1, {}), (2, 1, 2, {})]
)
def test_it_says_the_same_and_is_elsewhere_while_the_student_computes(ranks, tp, pp, changes):
    got, want = (run_ranks(ranks, taught, tp, pp, offload, changes) for offload in (True, False))
    for (metrics, seen), (others, kept) in zip(got, want, strict=True):
        assert metrics == others
        left = seen[-1]  # with whole targets the head, which the student's loss runs
        assert seen == [0.0, 1.0, 1.0, left, 1.0, 1.0, left] and set(kept) == {1.0}
        assert 0 < left < 1 if changes == WHOLE else left == 0


def test_a_sharded_teacher_rests_there_too():
    fsdp = {"parallel__fsdp": "teacher"}
    got, want = (run_ranks(2, taught, 1, 1, offload, fsdp) for offload in (True, False))
    assert [metrics for metrics, _ in got] == [metrics for metrics, _ in want]


def late(rank, ranks):
    """What a layer finds of its weights, where a copy is done no sooner than someone waits for its event."""
    with small.layout() as groups, pytest.MonkeyPatch.context() as patch:
        import torch

        from megakd.models.offload import Offload

        gpt = small.build(small.teacher_section(), small.config(), groups, seed=2, teacher=True).requires_grad_(False)
        want = [p.clone() for p in gpt.parameters()]
        offload = Offload(gpt)
        copies, seen = [], []
        copy_ = torch.Tensor.copy_

        class Lazy(type(offload.stream)):
            def record_event(self, event=None):
                mine = copies[:]
                copies.clear()
                return lambda: [copy_(*pair) for pair in mine]

        offload.stream = Lazy()
        stream = torch.cuda.current_stream()
        patch.setattr(type(stream), "wait_event", lambda self, event: event(), raising=False)
        patch.setattr(torch.Tensor, "copy_", lambda self, source, **how: copies.append((self, source)))
        for number, layer in enumerate(gpt.decoder.layers):

            def look(module, arguments, number=number):
                here = dict(zip(gpt.parameters(), want, strict=True))
                seen.append((number, all(torch.equal(p, here[p]) for p in module.parameters())))

            layer.register_forward_pre_hook(look)
        with offload:
            patch.undo()
            patch.setattr(type(stream), "wait_event", lambda self, event: event(), raising=False)
            from megakd.models.micro_batch import forward

            with torch.no_grad():
                forward(gpt, small.batch(0, groups, 4)[0])
        return seen


def test_a_layer_waits_for_its_own_weights():
    assert run_ranks(1, late)[0] == [(0, True), (1, True)]
