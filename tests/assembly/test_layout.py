"""The table of who holds what."""

import pytest

from megakd.config import Model
from megakd.planning.memory import rank_memory
from tests.ranks import run_ranks
from tests.training import small


def table(rank, ranks, parallel, student, teacher):
    """The table; parameters of student and teacher here, as a list of one each; those of the whole teacher."""
    axes = {f"parallel__{name}": size for name, size in parallel.items() if name not in ("tp", "pp", "teacher")}
    if "teacher" in parallel:
        axes["teacher__parallel"] = parallel["teacher"]
    tp, pp = parallel.get("tp", 1), parallel.get("pp", 1)
    config = small.config(tp, pp, student__model=small.student_section(**student), **axes)
    with (
        small.layout(tp, pp, ep=parallel.get("ep", 1)) as groups,
        small.wider_teacher(config, groups) as wider,
    ):
        import torch

        from megakd.assembly.layout import describe_layout
        from megakd.training.overview import count_parameters

        models = {"student": small.build(small.student_section(**student), config, groups, 1)}
        models["teacher"] = small.build(small.teacher_section(**teacher), config, groups, 1, teacher=True, wider=wider)
        held = [[sum(p.numel() for c in gpt.chunks for p in c.parameters())] for gpt in models.values()]
        whole = count_parameters(models["teacher"], models["teacher"].pg_collection, torch.device("cpu"))
        return describe_layout(config.parallel, groups, models), held, whole


def test_stages_layers_and_sizes():
    parallel = {"tp": 2, "pp": 2, "vpp": 2, "sp": True}
    results = run_ranks(4, table, parallel, {"num_layers": 8}, {})
    texts, held, _ = zip(*results, strict=True)
    assert len(set(texts)) == 1
    head, names, first, last = texts[0].split("\n")
    assert head == "4 ranks: tp 2 with sequence parallel, pp 2 (student: 2 virtual stages), dp 1"
    assert names.split() == ["stage", "ranks", "student", "teacher"]
    assert first.split()[:4] == ["0", "0", "to", "1"] and "embedding, layers 1-2 and 5-6: " in first
    assert last.split()[:4] == ["1", "2", "to", "3"] and "layers 3-4 and 7-8, head: " in last
    assert f"{held[0][0][0] / 1e6:.3f} M a rank" in first and f"{held[2][1][0] / 1e6:.3f} M a rank" in last


def test_what_fsdp_leaves_of_both():
    ((text, held, _), _) = run_ranks(2, table, {"fsdp": "both"}, {}, {})
    assert text.startswith("2 ranks: dp 2, FSDP of both models over 2\n")
    whole = [sum(one) for one in held]
    assert f": {whole[0] / 2e6:.3f} M a rank" in text and f": {whole[1] / 2e6:.3f} M a rank" in text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
def test_a_teacher_over_the_ranks_of_several_students(pp, tied):
    """Its layers are cut over more ranks, its head as the student's; the planner counts the same."""
    own, teacher = {"tp": 2, "sp": True}, {"tie_embeddings": tied}
    results = run_ranks(2 * pp, table, {"pp": pp, "teacher": own}, {}, teacher)
    ((*_, whole),) = run_ranks(1, table, {}, {}, teacher)
    config = small.config(pp=pp, teacher__parallel=own)
    models = [Model.model_validate(one) for one in (small.student_section(), small.teacher_section(**teacher))]
    for rank, (text, (_, (held,)), counted) in enumerate(results):
        assert "dp 2; teacher: tp 2 with sequence parallel, the ranks of 2 student replicas\n" in text
        assert f"{held / 1e6:.3f} M a rank" in text and counted == whole
        assert 4 * held == rank_memory(config, *models, dp=2, stage=rank // 2).teacher


def test_one_rank_holds_everything():
    ((text, *_),) = run_ranks(1, table, {}, {}, {})
    assert text.startswith("1 ranks: dp 1\n") and text.count("embedding, layers 1-2, head: ") == 2
