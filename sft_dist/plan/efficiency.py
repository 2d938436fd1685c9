"""Which share of the ideal rates a run is planned to reach, and what that rests on."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.hardware.gpus import Gpu
from sft_dist.hardware.observed import Kernels
from sft_dist.hardware.tables import shipped_table
from sft_dist.plan.calibration import Calibration
from sft_dist.plan.result import Basis, Range

# A measured run repeats itself within this share, on the same machine with the same configuration.
CALIBRATED_ERROR = 0.05
# Published rows share a machine and few models: of another run they say no more than this.
PUBLISHED_ERROR = 0.10


@dataclass(frozen=True)
class Efficiency:
    """Of ``plan/rates.py``'s rates; ``low`` and ``high`` of the range are slow and fast."""

    range: Range
    basis: Basis
    source: str


def efficiency_of(
    gpu: Gpu, *, method: str, kernels: Kernels = "eager", calibration: Calibration | None = None
) -> Efficiency:
    """The published one of the GPU's family, or an assumption; corrected by what was measured here.

    Args:
        method: as in the configuration; methods that train a few vectors count as LoRA.
        calibration: of this GPU and this kind of run.
    """
    found = _published(gpu, "lora" if method not in ("full", "qlora") else method, kernels)
    if calibration is None:
        return found
    value = found.range.value / calibration.time_ratio
    measured = Range(value, value * (1 - CALIBRATED_ERROR), value * (1 + CALIBRATED_ERROR))
    source = f"{calibration.steps} steps measured on {calibration.gpu} on {calibration.date}"
    return Efficiency(measured, "calibrated here", source)


def _published(gpu: Gpu, method: str, kernels: Kernels) -> Efficiency:
    table = shipped_table("step_efficiency.yaml")
    for row in table["efficiencies"]:
        if gpu.name.startswith(row["gpu"]) and (row["method"], row["kernels"]) == (method, kernels):
            source = f"{row['runs']} published runs of {method} on {row['gpu']}: {table['sources'][row['source']]}"
            value = row["value"]
            low, high = min(row["low"], value * (1 - PUBLISHED_ERROR)), max(row["high"], value * (1 + PUBLISHED_ERROR))
            return Efficiency(Range(value, low, high), "published", source)
    for row in table["efficiencies"]:
        # Methods on one GPU reach nearly the same share; GPUs differ more than methods do.
        if gpu.name.startswith(row["gpu"]) and row["kernels"] == kernels:
            source = f"no published step of {method} on {gpu.name} is known: as those of {row['method']} there"
            return Efficiency(Range(row["value"], row["low"], row["high"]), "assumed", source)
    assumed = table["assumed"]
    return Efficiency(
        Range(assumed["value"], assumed["low"], assumed["high"]),
        "assumed",
        f"no published step of {method} on {gpu.name} is known; between those of other GPUs",
    )
