"""What a run does before its first step with the data it is given."""

import os

import pytest

from megakd.errors import DataError
from tests.data.byte_tokenizer import byte_tokenizer
from tests.data.test_token_file_writers import write_either
from tests.ranks import run_ranks
from tests.training import small


def by_torchrun(rank):
    return {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}


def by_srun(rank):
    return {
        "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2",
    }  # fmt: skip


def opened(rank, ranks, folder, verify, launched):
    """What open_both says as local rank 0 and as local rank 1 of 2."""
    from megakd.assembly.data import open_both

    tokenizer, said = byte_tokenizer(folder), []
    fingerprint, vocab_size = tokenizer.fingerprint, tokenizer.vocab_size
    for name in ("a", "b", "held"):
        write_either(folder / name, [[65] * 50] * 3, name != "b", fingerprint=fingerprint, vocab_size=vocab_size)
    with open(folder / "held.mask", "r+b") as file:
        file.seek(8)
        file.write(b"\0")  # it was 1: a prompt would be learnt from
    config = small.config(
        data__train=[0.5, str(folder / "a"), 0.5, str(folder / "b")],
        data__validation=str(folder / "held"),
        data__verify=verify,
    )
    before = dict(os.environ)
    for local_rank in ("0", "1"):
        for name in by_torchrun(local_rank):
            os.environ.pop(name)
        os.environ.update(launched(local_rank))
        try:
            open_both(config, tokenizer)
            said.append("")
        except DataError as error:
            said.append(str(error))
        finally:
            os.environ.clear()
            os.environ.update(before)
    return said


@pytest.mark.parametrize("launched", [by_torchrun, by_srun])
def test_token_files_are_compared_with_their_digests_at_the_start(tmp_path, launched):
    """The eight parts of three files are eight chunks; of them one of two ranks reads the one that was changed."""
    (said,) = run_ranks(1, opened, tmp_path, "always", launched)
    assert sorted(map(bool, said)) == [False, True]
    assert "held.mask is damaged: its bytes 0 to 162 are not those that were written" in "".join(said)
    assert run_ranks(1, opened, tmp_path, "never", launched) == [["", ""]]
