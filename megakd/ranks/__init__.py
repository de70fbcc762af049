"""The ranks of one launch: torchrun's environment, the default process group, signals, logging, and how they end.

with Ranks(config.run.device) as ranks:
    while not ranks.agree_to_stop():
        ...
"""

from megakd.ranks.agreement import from_rank_0
from megakd.ranks.launch import Launch, read_launch, resolve_device
from megakd.ranks.ranks import Ranks

__all__ = ["Launch", "Ranks", "from_rank_0", "read_launch", "resolve_device"]
