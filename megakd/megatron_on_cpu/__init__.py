"""The device seam: the unmodified megatron-core runs on CPU and gloo, and bugs of its optimizer are mended.

Megatron-Core asks torch.cuda for its device, random state, streams and tensor types. On `cpu` this package answers
those questions with the CPU, by plain patches made before Megatron is imported (no mode, no cost per operation). On
`cuda` nothing is patched. Every other module may import Megatron only after `install(device)` has run.
"""

from megakd.megatron_on_cpu.importing import install

__all__ = ["install"]
