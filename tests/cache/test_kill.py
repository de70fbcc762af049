"""A writer that is killed at any instant leaves whole shards, goes on, and ends with the same bytes."""

import itertools
import os
import pathlib
import random
import signal
import time

from megakd.cache import CacheReader
from tests.cache.made import make_cache
from tests.ranks import forkserver

PARTS, KILLS, DIED = 24, 6, 77


def record(folder, seconds):
    """Records until so many seconds of processor time are used up, when the kernel ends it, wherever it is."""
    make_cache(folder.with_name(f"warm{os.getpid()}"), range(6), per_part=3)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    make_cache(folder, range(PARTS * 3), per_part=3)
    signal.setitimer(signal.ITIMER_PROF, 0)


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path):
    for folder, parts in (("warm", 2), ("whole", PARTS)):
        start = time.process_time()
        make_cache(tmp_path / folder, range(parts * 3), per_part=3)
        seconds = time.process_time() - start
    context, cut = forkserver(), tmp_path / "cut"
    chance, codes, shards = random.Random(5), [], []
    for _ in range(KILLS):
        writer = context.Process(target=record, args=(cut, chance.uniform(0.3, 1) * seconds / KILLS))
        writer.start()
        writer.join()
        codes.append(writer.exitcode)
        shards.append(len(list(cut.glob("shard-*.arrow"))))
    assert codes == [-signal.SIGPROF] * KILLS and 0 < shards[-1] < PARTS, "this test shows nothing"
    make_cache(cut, range(PARTS * 3), per_part=3)
    assert len(CacheReader(cut)) == PARTS * 3
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in cut.iterdir()) == names
    for name in names:
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def die_at(folder, instant):
    """Records, and ends without any clean-up at an instant counted over the renames (before, after) and deletions."""
    from megakd.cache import publish

    instants = itertools.count()

    def maybe():
        if next(instants) == instant:
            os._exit(DIED)

    def replace(*paths, rename=os.replace):
        maybe()
        rename(*paths)
        maybe()

    def unlink(path, missing_ok=False, delete=pathlib.Path.unlink):
        delete(path, missing_ok)
        maybe()

    publish.os.replace, pathlib.Path.unlink = replace, unlink
    make_cache(folder, range(5), per_part=2)


def test_killed_at_every_step_it_ends_as_if_it_had_not_been(tmp_path):
    make_cache(tmp_path / "whole", range(5), per_part=2)
    want = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    context, instant, code = forkserver(), 0, DIED
    while code == DIED:
        cut = tmp_path / str(instant)
        process = context.Process(target=die_at, args=(cut, instant))
        process.start()
        process.join()
        code, instant = process.exitcode, instant + 1
        make_cache(cut, range(5), per_part=2)
        assert {path.name: path.read_bytes() for path in cut.iterdir()} == want, instant
    assert code == 0 and instant > 25, "the last writer lives to its end"
