"""What srun says about its tasks: which rank each is, and where rank 0 waits for the others."""

import re
from collections.abc import Mapping

from megakd.errors import ConfigError

# How many tasks Slurm has started: of the step, else of the job.
TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
FIRST_PORT, PORTS = 20000, 8192  # below the ports that Linux gives to outgoing connections


def number_of(environ: Mapping[str, str], names: tuple[str, ...], default: int = 1) -> int:
    """The first of several variables that is there and a number."""
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), default)


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process as one of several tasks of a step, and numbered them.

    A batch script has SLURM_PROCID too, of its own one task; the step's number of tasks is srun's alone.
    """
    numbered = all(environ.get(name, "").isdecimal() for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    return numbered and environ.get(TASKS[0], "").isdecimal() and int(environ[TASKS[0]]) > 1


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: `gpu[007-012,020],login1` → `gpu007`.

    Raises:
        ConfigError: it is no such list.
    """
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
    if not re.fullmatch(r"[\w.:-]+", host):
        raise ConfigError(
            f"environment: the step's list of nodes is {nodes!r}, which names no first host",
            hint="set MASTER_ADDR to the host of rank 0",
        )
    return host


def tasks_on_node(environ: Mapping[str, str]) -> int:
    """Tasks of this step on this node, from counts as Slurm writes them (`8(x3),4`); 0 when it did not say."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = number_of(environ, ("SLURM_NODEID",), 0)
    return counts[node] if node < len(counts) else 0


def meeting_place(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of rank 0: MASTER_ADDR and MASTER_PORT where they are set, else the step's first host and a port
    that follows from job and step.

    Raises:
        ConfigError: the variables are no host or no port.
    """
    port = environ.get("MASTER_PORT")
    if port is None:
        job, step = (number_of(environ, names, 0) for names in (("SLURM_JOB_ID",), ("SLURM_STEP_ID", "SLURM_STEPID")))
        port = str(FIRST_PORT + (job * 7 + step) % PORTS)
    if not port.isdecimal():
        raise ConfigError(f"environment: MASTER_PORT is {port!r}, expected a number", hint="unset it, or correct it")
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"], int(port)
    if number_of(environ, NODES) == 1:
        return "127.0.0.1", int(port)
    return first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")), int(port)


def check_one_launch(environ: Mapping[str, str]) -> None:
    """Raises ConfigError where srun has started more torchruns than belong together: each would be a run of its own.

    Args:
        environ: of a rank that torchrun has started.
    """
    tasks, agents = number_of(environ, TASKS[:1]), environ.get("GROUP_WORLD_SIZE", "")
    if agents.isdecimal() and tasks > int(agents):
        nodes = number_of(environ, NODES)
        raise ConfigError(
            f"environment: srun has started {tasks} torchruns, which do not know of each other: this one is of a "
            f"launch with {agents}, and each such launch would train alone in the same folder",
            hint=f"one torchrun on each node, told of all: `srun --ntasks-per-node=1 torchrun --nnodes={nodes} "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT ...`; or no torchrun and one task a rank; runs that are "
            "meant to be separate each get an srun with --ntasks=1",
        )
