"""What every run does first: read its config, check it against the launch, and join the ranks."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from megakd.config import Config, check_ranks
from megakd.ranks import Ranks, read_launch
from megakd.runs.facts import run_facts


@contextlib.contextmanager
def start_run(
    argv: Sequence[str], *, reports: bool = False, check: Callable[[Config, int], object] = check_ranks
) -> Iterator[tuple[Config, Ranks]]:
    """Yields the config and the ranks of `megakd VERB CONFIG.yaml [key=value ...]`; the ranks part when the block ends.

    Args:
        argv: what follows the verb.
        reports: heartbeat and, should the launch get stuck, stacks go to the run folder.
        check: of the config against the number of ranks; raises ConfigError.

    Raises:
        ConfigError: before the ranks meet, when the config is wrong in itself or does not fit their number.
        MegakdError: the ranks do not meet.
    """
    config = Config.from_arguments(argv)
    check(config, read_launch(os.environ).world_size)
    with Ranks(
        config.run.device,
        collective_seconds=config.run.timeout_seconds,
        watchdog_seconds=config.run.watchdog_seconds,
        reports=config.run.dir if reports else None,
        facts=run_facts(config),
    ) as ranks:
        yield config, ranks
