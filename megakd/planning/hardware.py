"""What accelerators can do, by their makers' data sheets: dense bfloat16 products with float32 sums, and memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One row.

    Attributes:
        flops: most bfloat16 operations a second, without sparsity.
        memory_bytes: of one; makers' GB are 1e9 bytes.
        source: where both stand.
    """

    name: str
    flops: float
    memory_bytes: int
    source: str


ACCELERATORS = {
    "a100-40gb": Accelerator("A100 40GB SXM", 312e12, 40 * 10**9, "NVIDIA A100 data sheet, 2021"),
    "a100": Accelerator("A100 80GB SXM", 312e12, 80 * 10**9, "NVIDIA A100 data sheet, 2021"),
    "h100": Accelerator("H100 80GB SXM", 989e12, 80 * 10**9, "NVIDIA H100 data sheet, 2023 (1,979 with sparsity)"),
    "h200": Accelerator("H200 141GB SXM", 989e12, 141 * 10**9, "NVIDIA H200 data sheet, 2024 (1,979 with sparsity)"),
    "b200": Accelerator("B200 SXM", 2250e12, 180 * 10**9, "NVIDIA HGX data sheet, 2025 (4,500 with sparsity)"),
    "l40s": Accelerator("L40S 48GB", 362e12, 48 * 10**9, "NVIDIA L40S data sheet, 2023 (733 with sparsity)"),
}
