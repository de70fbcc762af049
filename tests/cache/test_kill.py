"""A writer that is killed at any instant leaves whole shards, goes on, and ends with the same bytes."""

import itertools
import os
import pathlib
import random
import time

from megakd.cache import CacheReader
from tests.cache.made import make_cache
from tests.ranks import forkserver

PARTS, KILLS, DIED = 40, 8, 77


def record(folder, started):
    started.set()
    make_cache(folder, range(PARTS * 3), per_part=3)


def shards(folder) -> int:
    return len(list(folder.glob("shard-*.arrow")))


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path):
    start = time.perf_counter()
    make_cache(tmp_path / "whole", range(PARTS * 3), per_part=3)
    seconds = time.perf_counter() - start
    context, cut = forkserver(), tmp_path / "cut"
    chance, interrupted = random.Random(5), 0
    for _ in range(KILLS):
        started = context.Event()
        writer = context.Process(target=record, args=(cut, started))
        writer.start()
        started.wait(60)
        enough = shards(cut) + chance.randint(0, PARTS // KILLS - 1)  # not by the clock alone: machines differ
        while writer.is_alive() and shards(cut) < enough:
            time.sleep(0.001)
        writer.join(chance.uniform(0, seconds / PARTS))
        interrupted += writer.is_alive()
        writer.kill()
        writer.join()
    assert interrupted >= KILLS // 2, "the writer was too fast to be killed: this test shows nothing"
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
        process.join(60)
        code, instant = process.exitcode, instant + 1
        make_cache(cut, range(5), per_part=2)
        assert {path.name: path.read_bytes() for path in cut.iterdir()} == want, instant
    assert code == 0 and instant > 25, "the last writer lives to its end"
