"""An agent of torchrun, as `torchrun --nproc-per-node 1` is one, whose rank is forked with the imports done, and takes
the ranks of other agents for those of other machines: a launch over several nodes on this one.

    main([nodes, node, port, max_restarts, ARGUMENTS of rank(...)])
"""

import importlib
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def main(arguments):
    nodes, node, port, restarts, *rest = arguments
    config = LaunchConfig(
        min_nodes=int(nodes), max_nodes=int(nodes), nproc_per_node=1, run_id="nodes", rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}", rdzv_configs={"is_host": node == "0", "join_timeout": 60},
        max_restarts=int(restarts), start_method="fork", local_addr="127.0.0.1",
    )  # fmt: skip
    try:
        elastic_launch(config, rank)(node, *rest)
    except (ChildFailedError, RendezvousError) as error:
        sys.stderr.write(f"agent {node}: {type(error).__name__}\n")
        return 1
    return 0


def rank(node, pid_file, function, *arguments):
    """Calls `module:function` with the arguments; ends with what it returns."""
    from megakd.ranks import peers

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    peers.kernel = lambda: f"node {node}"
    with open(f"{pid_file}.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, pid_file)
    module, _, name = function.partition(":")
    code = getattr(importlib.import_module(module), name)(*arguments)
    if code:
        raise SystemExit(code)
