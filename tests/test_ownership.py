"""Files by which one process owns what others may want to write too, with locks and without."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading

import pytest

from megakd.ownership import Taken, check_owner, name, owning
from tests.cache.made import make_cache


@pytest.fixture
def no_locks(monkeypatch):
    """What flock answers on Lustre that is mounted without locks."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_who_comes_second_is_refused_by_the_name_of_the_first(tmp_path):
    path = tmp_path / "lock"
    with owning(path):
        assert path.read_text() == name() and f"pid {os.getpid()} " in name()
        with pytest.raises(Taken, match=f"^{name()}$"), owning(path):
            pass
        assert path.read_text() == name()
        check_owner(path)
    assert path.read_text() == ""
    with owning(path, remove=True):
        pass
    assert not path.exists()


def test_a_process_that_was_killed_owns_nothing(tmp_path):
    program = "import os, sys; from megakd.ownership import owning\nwith owning(sys.argv[1]): os._exit(9)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], check=False)
    assert (tmp_path / "lock").read_text() not in ("", name())
    with owning(tmp_path / "lock"):
        check_owner(tmp_path / "lock")


def test_one_that_waits_and_one_that_comes_later_do_not_both_own_a_file_that_was_removed(tmp_path):
    path, inside, most = tmp_path / "lock", [], []

    def own():
        with owning(path, wait=True, remove=True):
            inside.append(1)
            most.append(len(inside))
            check_owner(path)
            inside.pop()

    with owning(path, remove=True):
        threads = [threading.Thread(target=own) for _ in range(8)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 8 and not path.exists()


def test_without_locks_the_last_that_came_owns_and_the_first_learns_of_it(tmp_path, no_locks, caplog, monkeypatch):
    path = tmp_path / "lock"
    with owning(path):
        assert "this file system has no locks (Function not implemented)" in caplog.text
        check_owner(path)
        with monkeypatch.context() as other:
            other.setattr("megakd.ownership.name", lambda: "node7 pid 12 job 34")
            with owning(path):
                check_owner(path)
            path.write_text("node7 pid 12 job 34")  # as while it goes on
        with pytest.raises(OSError, match=r"was taken by another launch \(node7 pid 12 job 34\)"):
            check_owner(path)
    assert path.read_text() == "node7 pid 12 job 34", "it is the other one's"


def test_a_cache_is_written_without_locks(tmp_path, no_locks, caplog):
    with caplog.at_level(logging.WARNING, "megakd"):
        assert make_cache(tmp_path).finished
    assert caplog.text.count("has no locks") == 1 and (tmp_path / "writer.lock").read_text() == ""


def test_a_run_folder_is_used_without_locks(tmp_path, no_locks, caplog):
    from tests.ranks import run_ranks

    assert run_ranks(1, own_a_run_folder, str(tmp_path)) == [name().split()[0]]


def own_a_run_folder(rank, ranks, folder):
    import pathlib
    import unittest.mock

    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.training.run_folder import check_owner, take

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with unittest.mock.patch("fcntl.flock", flock), take(pathlib.Path(folder)):
        check_owner(folder)
        return (pathlib.Path(folder) / "owner.lock").read_text().split()[0]
