"""What ranks of a run compare when they meet: settings, versions, and the environment that changes results."""

import importlib.metadata

import pytest

from megakd.config import Config
from megakd.ranks.agreement import differences
from megakd.runs import facts
from megakd.runs.facts import launch_facts, run_facts
from tests import forked
from tests.training import runs


def said(tmp_path, environ=(), **changes):
    config = runs.values(tmp_path, tmp_path / "run", **changes)
    return run_facts(Config.from_dict(config), dict(environ))


CHANGES = {
    "optimizer.lr": {"optimizer__lr": 0.02},
    "run.seed": {"run__seed": 7},
    "parallel.tp": {"parallel__tp": 2},
    "checkpoint.every_steps": {"checkpoint__every_steps": 3},
    "data.train": {"data__train": "elsewhere"},
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_differs_is_named(key, tmp_path):
    lines = differences([said(tmp_path), said(tmp_path), said(tmp_path, **CHANGES[key])])
    assert [line.partition(":")[0] for line in lines] == [key] and lines[0].endswith("on rank 2")


def test_top_k_that_differs_is_named(tmp_path):
    with_teacher = {"teacher__checkpoint": "t"}
    few, many = (said(tmp_path, loss__top_k=k, **with_teacher) for k in (5, 7))
    assert differences([few, many]) == ["loss.top_k: 5 on rank 0, 7 on rank 1"]


def test_variables_that_change_results_are_compared_and_names_of_devices_are_not(tmp_path):
    one = said(tmp_path, {"NVTE_FLASH_ATTN": "1", "CUDA_VISIBLE_DEVICES": "0", "NCCL_SOCKET_IFNAME": "eth0"})
    other = said(tmp_path, {"NVTE_FLASH_ATTN": "0", "CUDA_VISIBLE_DEVICES": "1", "NCCL_SOCKET_IFNAME": "ib0"})
    assert differences([one, other]) == ["environment NVTE_FLASH_ATTN: 1 on rank 0, 0 on rank 1"]
    lonely = said(tmp_path, {"MEGAKD_LIMIT_LAYERS": "9", "NCCL_ALGO": "Ring"})
    assert [line.partition(":")[0] for line in differences([lonely, said(tmp_path)])] == [
        "environment MEGAKD_LIMIT_LAYERS",
        "environment NCCL_ALGO",
    ]


def test_versions_and_sources_are_compared(monkeypatch):
    here = launch_facts({})
    assert here["torch"] == importlib.metadata.version("torch") and here["apex"] == "not installed"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(facts, "sources_digest", lambda: "other")
    names = [line.partition(":")[0] for line in differences([here, launch_facts({})])]
    assert names == ["apex", "megakd", "megatron-core", "torch", "transformer-engine", "triton"]


VERBS = {
    "train": ["optimizer.lr={}"],
    "cache": ["cache.shard_samples={}"],
    "generate": ["--checkpoint", "none", "--prompt", "a", "--device", "cpu", "--max-new-tokens", "{}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_several_ranks_compares_them(verb, tmp_path):
    """Before it opens anything: nothing that is named here is there."""
    config = runs.values(tmp_path, tmp_path / "run", teacher__checkpoint="none", teacher__cache=str(tmp_path / "cache"))
    given = [] if verb == "generate" else [runs.write_config(tmp_path, config)]
    port, ranks = str(forked.free_port()), []
    for rank in "01":
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = runs.ENVIRONMENT | numbers | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = [*given, *(text.format(int(rank) + 3) for text in VERBS[verb])]
        ranks.append(forked.Forked("megakd.cli", verb, *arguments, environment=environment, together=True))
    try:
        outputs = [process.communicate(200)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 1], outputs
    name = {"train": "optimizer.lr", "cache": "cache.shard_samples", "generate": "max_new_tokens"}[verb]
    for output in outputs:
        assert f"the ranks were not started alike: {name}: 3" in output and "on rank 0, 4" in output, output
