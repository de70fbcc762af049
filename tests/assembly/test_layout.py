"""The table of who holds what."""

from tests.ranks import run_ranks
from tests.training import small


def table(rank, ranks, parallel, student, teacher):
    axes = {f"parallel__{name}": size for name, size in parallel.items() if name not in ("tp", "pp")}
    tp, pp = parallel.get("tp", 1), parallel.get("pp", 1)
    with small.layout(tp, pp, ep=parallel.get("ep", 1)) as groups:
        from megakd.assembly.layout import describe_layout

        config = small.config(tp, pp, student__model=small.student_section(**student), **axes)
        models = {"student": small.build(small.student_section(**student), config, groups, 1)}
        models["teacher"] = small.build(small.teacher_section(**teacher), config, groups, 1, teacher=True)
        held = [[sum(p.numel() for c in gpt.chunks for p in c.parameters())] for gpt in models.values()]
        return describe_layout(config.parallel, groups, models), held


def test_stages_layers_and_sizes():
    parallel = {"tp": 2, "pp": 2, "vpp": 2, "sp": True}
    results = run_ranks(4, table, parallel, {"num_layers": 8}, {})
    texts, held = zip(*results, strict=True)
    assert len(set(texts)) == 1
    head, names, first, last = texts[0].split("\n")
    assert head == "4 ranks: tp 2 with sequence parallel, pp 2 (student: 2 virtual stages), dp 1"
    assert names.split() == ["stage", "ranks", "student", "teacher"]
    assert first.split()[:4] == ["0", "0", "to", "1"] and "embedding, layers 1-2 and 5-6: " in first
    assert last.split()[:4] == ["1", "2", "to", "3"] and "layers 3-4 and 7-8, head: " in last
    assert f"{held[0][0][0] / 1e6:.3f} M a rank" in first and f"{held[2][1][0] / 1e6:.3f} M a rank" in last


def test_what_fsdp_leaves_of_both():
    ((text, held), _) = run_ranks(2, table, {"fsdp": "both"}, {}, {})
    assert text.startswith("2 ranks: dp 2, FSDP of both models over 2\n")
    whole = [sum(one) for one in held]
    assert f": {whole[0] / 2e6:.3f} M a rank" in text and f": {whole[1] / 2e6:.3f} M a rank" in text


def test_one_rank_holds_everything():
    ((text, _),) = run_ranks(1, table, {}, {}, {})
    assert text.startswith("1 ranks: dp 1\n") and text.count("embedding, layers 1-2, head: ") == 2
