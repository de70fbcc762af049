"""`megakd check --env`: what is installed here, what each part is used for, and what it costs that one is missing."""

import importlib
import importlib.metadata
import json
import os
import platform
import textwrap
from dataclasses import asdict, dataclass

from megakd import __version__
from megakd.runs.facts import launch_facts, sources_digest

NEEDED, GPU, CHOICE = "needed", "on GPUs", "where it is used"


@dataclass(frozen=True)
class Package:
    """One that megakd, or Megatron-Core beneath it, uses.

    Attributes:
        name: as `pip` calls it.
        module: what is imported.
        kind: NEEDED by every run, GPU where torch sees one, or a CHOICE of the user.
        use: what it does here.
        without: what its absence costs; of a needed one, nothing runs.
    """

    name: str
    module: str
    kind: str
    use: str
    without: str = "megakd cannot run: pip install it"


@dataclass(frozen=True)
class Part:
    """What was found of one thing.

    Attributes:
        version: None where it is not there.
        note: what is wrong with it, or what its absence costs; empty where there is nothing to say.
        works: it is there and can be imported.
    """

    name: str
    kind: str
    version: str | None
    use: str
    note: str
    works: bool


PACKAGES = (
    Package("torch", "torch", NEEDED, "tensors, autograd, gloo and NCCL"),
    Package("megatron-core", "megatron.core", NEEDED, "models, parallelism, optimizer, schedules, checkpoints"),
    Package("numpy", "numpy", NEEDED, "token files and caches"),
    Package("pyarrow", "pyarrow", NEEDED, "shards of the logit cache, Parquet data"),
    Package("pydantic", "pydantic", NEEDED, "the config and its checks"),
    Package("pyyaml", "yaml", NEEDED, "the config's file"),
    Package("jinja2", "jinja2", NEEDED, "chat templates"),
    Package("safetensors", "safetensors", NEEDED, "weights of Hugging Face folders"),
    Package("sentencepiece", "sentencepiece", NEEDED, "tokenizers of .model files, and training one"),
    Package("tokenizers", "tokenizers", NEEDED, "tokenizers of tokenizer.json files"),
    Package("transformers", "transformers", NEEDED, "the other side of a conversion's comparison of logits"),
    Package("tensorboard", "tensorboard", NEEDED, "log.tensorboard"),
    Package("fsspec", "fsspec", NEEDED, "finished files that go to an address elsewhere"),
    Package("tqdm", "tqdm", NEEDED, "progress bars"),
    Package("xxhash", "xxhash", NEEDED, "digests of checkpoints and data"),
    Package(
        "triton", "triton", GPU, "the kernels of the loss and of the teacher's top-k",
        "they are PyTorch's then, at several times the time: pip install triton",
    ),
    Package(
        "transformer-engine", "transformer_engine.pytorch", GPU,
        "layers with fused norms and flash attention, and a fused Adam",
        "Megatron's local layers with PyTorch's attention, unfused norms, and every expert rank sees all tokens: "
        'pip install "megakd[cuda]"',
    ),
    Package(
        "apex", "apex.optimizers", GPU, "a fused Adam and gradient norm, where Transformer Engine is missing",
        "nothing with Transformer Engine; without either, torch's Adam. Not the `apex` of the public index: NVIDIA's "
        "images have it",
    ),
    Package("matplotlib", "matplotlib", CHOICE, "cache stat --plot and evaluate --reliability",
            'those two are refused: pip install "megakd[plots]"'),
    Package("wandb", "wandb", CHOICE, "log.wandb_project", 'it is refused: pip install "megakd[wandb]"'),
    Package("lm-eval", "lm_eval", CHOICE, "evaluate --tasks", 'it is refused: pip install "megakd[eval]"'),
    Package("nvidia-resiliency-ext", "nvidia_resiliency_ext.fault_tolerance", CHOICE, "ranks that ft_launcher starts",
            "it watches for their exit alone; torchrun and srun do not ask for it"),
)  # fmt: skip


def report(as_json: bool) -> int:
    """Prints the report; the exit code is 0, whatever is missing."""
    variables = {name: os.environ[name] for name in sorted(relevant_names()) if name in os.environ}
    machine, parts = describe_machine(), [look_at(package) for package in PACKAGES]
    if as_json:
        print(json.dumps({"machine": machine, "parts": [asdict(part) for part in parts], "environment": variables}))
        return 0
    width = max(len(part.name) for part in parts)
    print(f"megakd {__version__}, sources {sources_digest()}, Python {platform.python_version()}")
    for name, text in machine.items():
        print(f"{name:<{width + 2}}{text}")
    for kind in (NEEDED, GPU, CHOICE):
        print(f"\n{kind}:")
        for part in (part for part in parts if part.kind == kind):
            print(f"  {part.name:<{width}}  {part.version or 'missing':<12}  {part.use}")
            indent = " " * (width + 18)
            if part.note:
                print(textwrap.fill(part.note, 110, initial_indent=indent, subsequent_indent=indent))
    if variables:
        print("\nenvironment that changes results or how ranks talk:")
        print("\n".join(f"  {name}={value}" for name, value in variables.items()))
    return 0


def look_at(package: Package) -> Part:
    """Whether it is there, and whether it can be imported: what was built for another torch or CUDA cannot."""
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return Part(package.name, package.kind, None, package.use, package.without, False)
    try:
        import_quietly(package.module)
    except Exception as error:  # whatever its own import raises
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        note = f"is there, but cannot be imported: {reason}"
        if package.name == "apex":
            note += " (NVIDIA's Apex, or the other project of that name?)"
        return Part(package.name, package.kind, version, package.use, f"{note}; without it: {package.without}", False)
    return Part(package.name, package.kind, version, package.use, outside_of_tried(package.name, version), True)


def import_quietly(module: str) -> None:
    """Imports it; Megatron with the seam for a CPU, and without what it says of packages that the report names."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if module.startswith("megatron"):
            import torch

            from megakd.megatron_on_cpu import install

            logger = logging.getLogger("megakd")
            level = logger.level
            logger.setLevel(logging.ERROR)
            try:
                install("cuda" if torch.cuda.is_available() else "cpu")
            finally:
                logger.setLevel(level)
        importlib.import_module(module)


def outside_of_tried(name: str, version: str) -> str:
    """A sentence where this version is not among those that megakd was tried with; else empty."""
    if name != "megatron-core":
        return ""
    from megakd.megatron_on_cpu.importing import TESTED, was_tested

    tried = f"tried: {TESTED[0]} to {TESTED[1]}"
    return tried if was_tested(version) else f"{tried}, and not this one; docs/is-my-run-right.md says what to look at"


def describe_machine() -> dict[str, str]:
    """Processor, memory, GPUs and what ranks talk through."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "machine": f"{cores} cores for this process, {memory_bytes / 1e9:.0f} GB of memory",
    }
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:
        return found | {"GPUs": f"cannot be told without torch: {error}"}
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        found["GPUs"] = f"none that torch sees ({built}): runs take the CPU"
    else:
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        words = {f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute {card.major}.{card.minor}" for card in cards}
        found["GPUs"] = f"{len(cards)}: {'; '.join(sorted(words))}"
        found["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if dist.is_available() and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "of torch"
        found["NCCL"] = f"{nccl}: ranks on GPUs talk through it"
    else:
        found["NCCL"] = "missing: ranks on GPUs cannot talk; on a CPU they do not need it"
    has_gloo = dist.is_available() and dist.is_gloo_available()
    found["gloo"] = "there: ranks on a CPU talk through it" if has_gloo else "missing: only one rank can run on a CPU"
    return found


def relevant_names() -> set[str]:
    """Variables of this process that the ranks of a run compare, and those that choose devices and networks."""
    compared = [name.removeprefix("environment ") for name in launch_facts() if name.startswith("environment ")]
    chosen = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG",
              "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "LD_PRELOAD")  # fmt: skip
    return {*compared, *chosen}
