"""Groups of a teacher whose tensor parallel ranks are those of several student replicas; its curves: test_axes.py."""

import pytest

from tests.ranks import run_ranks
from tests.training import small

NAMES = "tp pp dp mp cp ep embd tp_cp dp_cp expt_tp expt_dp tp_ep tp_ep_pp tp_dp_cp".split()


def members(groups):
    import torch.distributed as dist

    return {name: dist.get_process_group_ranks(getattr(groups, name)) for name in NAMES if getattr(groups, name)}


def both(rank, ranks, tp, pp, wider_tp):
    """Ranks of every group of the teacher, as Megatron makes them for its tp, and those that share it."""
    import torch.distributed as dist

    with small.layout(tp, pp) as groups:
        from megakd.models.groups import build_wider_groups

        wider = build_wider_groups(groups, wider_tp)
        made, sharing = members(wider.groups), dist.get_process_group_ranks(wider.sharing)
        left = members(groups)
        wider.destroy()
    with small.layout(wider_tp, pp) as groups:
        return made, members(groups), left, sharing


@pytest.mark.parametrize(("tp", "pp", "wider_tp"), [(1, 1, 2), (1, 1, 4), (2, 1, 4), (1, 2, 2)])
def test_they_are_megatrons_own_for_that_tp(tp, pp, wider_tp):
    for rank, (made, want, left, sharing) in enumerate(run_ranks(4, both, tp, pp, wider_tp)):
        assert made == want and len(want) > 10
        assert len(left["tp"]) == tp and made["tp"] != left["tp"], "the student's are as they were"
        assert sharing == made["tp"][rank % tp :: tp]
