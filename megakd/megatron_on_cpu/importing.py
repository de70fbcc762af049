"""Imports Megatron for one device, quietly, after what it needs is in place."""

import contextlib
import logging
import re
import warnings

import torch

from megakd.megatron_on_cpu.device import pose_as_cuda, seed_as_cuda
from megakd.megatron_on_cpu.mends import mend_buckets, mend_distributed_optimizer

LOG = logging.getLogger("megakd")
TESTED = ("0.16.1", "0.19.2")  # the oldest and the newest Megatron-Core that the tests have run on; see pyproject.toml
ADVICE = (  # for those who write on Megatron, of 0.19; megakd's users can do nothing with it
    "GPTModel IS DEPRECATED",
    "DistributedDataParallel: full_param_layout not provided",
)


def install(device: str) -> None:
    """Make megatron-core importable and usable on `device`; call before anything imports it. Safe to call again.

    Args:
        device: "cpu" or "cuda" (resolved: never "auto").
    """
    if device == "cpu":
        pose_as_cuda()
    with _fusions_left_alone() if device == "cpu" else contextlib.nullcontext():
        _import_quietly()
    if device == "cpu":
        seed_as_cuda()
    mend_distributed_optimizer()
    mend_buckets()


@contextlib.contextmanager
def _fusions_left_alone():
    """Megatron's fusions stay as they are written: compiled, they cost minutes of C++ and gain nothing on a CPU.

    Even switched off by TORCH_COMPILE_DISABLE, the decorator imports the compiler: 3.5 of 9 seconds of a rank's start.
    Megatron takes torch.compile when it is first imported, and keeps it for the modules that come later.
    """
    compile_, torch.compile = torch.compile, lambda function=None, **options: function or (lambda late: late)
    try:
        yield
    finally:
        torch.compile = compile_


def _import_quietly() -> None:
    """Import Megatron with its eight warnings about absent packages replaced by one line that says what follows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", message=r"(Transformer Engine and Apex are|Apex is) not installed")
        import megatron.core.models.gpt.gpt_layer_specs  # it warns too, and every model needs it
        import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    # While it runs, Megatron uses old names of torch and looks at .grad of views: not the doing of the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|megatron)\.")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    for name in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{name}").addFilter(is_for_users)
    warn_of_version(megatron.core.__version__)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        LOG.info("neither Transformer Engine nor Apex is installed: torch's own Adam, norms and attention are used")


def is_for_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ADVICE)


def was_tested(version: str) -> bool:
    """Whether a Megatron-Core is of a minor version within TESTED."""
    oldest, newest, here = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (*TESTED, version))
    return oldest <= here <= newest


def warn_of_version(version: str) -> None:
    """One line for a Megatron-Core that nobody has tried megakd with."""
    if not was_tested(version):
        LOG.warning(
            "megatron-core %s: megakd was tested with %s to %s; docs/is-my-run-right.md says what to look at",
            version, *TESTED,
        )  # fmt: skip
