"""A writer that is killed at any instant leaves whole shards, goes on, and ends with the same bytes."""

import multiprocessing
import random
import time

from megakd.cache import CacheReader
from tests.cache.made import make_cache

PARTS, KILLS = 40, 8


def record(folder, started):
    started.set()
    make_cache(folder, range(PARTS * 3), per_part=3)


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path):
    start = time.perf_counter()
    make_cache(tmp_path / "whole", range(PARTS * 3), per_part=3)
    seconds = time.perf_counter() - start
    context, cut = multiprocessing.get_context("forkserver"), tmp_path / "cut"
    context.set_forkserver_preload(["tests.cache.made"])
    delays, interrupted = random.Random(5), 0
    for _ in range(KILLS):
        started = context.Event()
        writer = context.Process(target=record, args=(cut, started))
        writer.start()
        started.wait(60)
        writer.join(delays.uniform(0, seconds / 4))
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
