"""What published runs reached: utilisation by GPU, method and kernels, and memory outside torch's allocator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sft_dist.hardware.gpus import GIB
from sft_dist.hardware.tables import shipped_table

Kernels = Literal["fused", "eager", "compiled"]

Overhead = Literal["cuda_context_lazy", "cuda_context_eager", "first_collective", "least_that_ran"]


@dataclass(frozen=True)
class Efficiency:
    """Hardware FLOPs utilisation of published runs, over the GPU's peak in bf16.

    Args:
        gpu: name in the table of GPUs.
        recomputed: whether backward computed the layers again; those FLOPs count.
        low, high: the range seen; p10: the tenth percentile, None where runs are few.
    """

    gpu: str
    method: Literal["full", "lora", "qlora"]
    kernels: Kernels
    size: Literal["up to 15B", "70B"]
    recomputed: bool
    median: float
    low: float
    high: float
    runs: int
    source: str
    p10: float | None = None
    note: str = ""


@cache
def efficiencies() -> tuple[Efficiency, ...]:
    """Every row of the table, ``source`` spelt out."""
    table = shipped_table("observed.yaml")
    return tuple(Efficiency(**(row | {"source": table["sources"][row["source"]]})) for row in table["efficiencies"])


def overhead_bytes(name: Overhead) -> int:
    """Bytes of a GPU that torch's allocator does not count."""
    return int(_overhead(name)["gib"] * GIB)


def overhead_source(name: Overhead) -> str:
    """Where that figure comes from."""
    return str(shipped_table("observed.yaml")["sources"][_overhead(name)["source"]])


def _overhead(name: Overhead) -> dict[str, Any]:
    entry: dict[str, Any] = shipped_table("observed.yaml")["overheads"][name]
    return entry
