"""What every rank of a run must have alike before anything is built."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping

import megakd
from megakd.config import Config

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "triton")
# Variables that change numbers or how ranks talk to each other; names of devices and interfaces may differ.
PREFIXES = ("NVTE_", "MEGAKD_", "CUBLAS_")
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "MKL_CBWR",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_COMPILE_DISABLE",
    "TRITON_INTERPRET",
)


def run_facts(config: Config, environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The resolved config by key, and launch_facts."""
    return config.flat() | launch_facts(environ)


def launch_facts(environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Versions of what computes, and environment that changes results."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "megakd": f"{megakd.__version__}, sources {sources_digest()}",
    }
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    named = {name for name in environ if name.startswith(PREFIXES)} | set(VARIABLES)
    return facts | {f"environment {name}": environ[name] for name in sorted(named) if name in environ}


def sources_digest() -> str:
    """Of megakd's own files: an installation that one machine has of its own shows here, the version being the same."""
    digest, root = hashlib.sha256(), pathlib.Path(megakd.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
