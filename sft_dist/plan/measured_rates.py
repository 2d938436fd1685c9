"""What ``sft-dist calibrate`` measured of a GPU, kept on this machine: plans take it in place of the table's figures.

One JSON file for each GPU, beside those of ``plan/calibration.py``. A file that is damaged or of another format counts
as absent: all of it can be measured again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pydantic import TypeAdapter

from sft_dist.hardware.gpus import ComputeDtype, Gpu, normal_name
from sft_dist.plan.calibration import Calibration, calibration_folder
from sft_dist.plan.rates import MEMORY_SHARE, link_share
from sft_dist.runtime.whole_file import replace_file

FORMAT = 1


@dataclass(frozen=True)
class MeasuredRates:
    """Of one kind of GPU on this machine.

    Args:
        gpu: its name in the table of GPUs.
        product_flops_per_s: the best matrix product, by compute dtype.
        memory_bytes_per_s: read and written by a large copy.
        link_bytes_per_s: of one GPU in one direction, as a ring of so many processes reaches it (NCCL's bus bandwidth).
        date: ISO 8601.
    """

    gpu: str
    product_flops_per_s: dict[ComputeDtype, float]
    memory_bytes_per_s: float
    link_bytes_per_s: dict[int, float]
    date: str
    versions: dict[str, str]


_RATES = TypeAdapter(MeasuredRates)


def as_measured(gpu: Gpu, rates: MeasuredRates, *, gpus_per_node: int) -> Gpu:
    """A GPU of the table with the figures that were measured of it.

    ``plan/rates.py`` takes shares of a memory's and a link's rate, because tables have what the maker says; here the
    shares are taken out, so that what was measured comes out of it.
    """
    shares = {dtype: rate / gpu.achievable_flops[dtype] for dtype, rate in rates.product_flops_per_s.items()}
    # A dtype that was not measured is off by as much as those that were.
    usual = sum(shares.values()) / len(shares) if shares else 1.0
    link = gpu.link_among(gpus_per_node)
    measured = rates.link_bytes_per_s.get(gpus_per_node)
    if measured is not None:
        link = replace(link, bytes_per_s=measured / link_share(link), per_peer_bytes_per_s=None, max_gpus=None)
    return replace(
        gpu,
        achievable_flops=MappingProxyType(
            {dtype: rate * shares.get(dtype, usual) for dtype, rate in gpu.achievable_flops.items()}
        ),
        achievable_basis=f"matrix products and copies calibrated here on {rates.date}",
        achievable_measured=True,
        memory_bandwidth=rates.memory_bytes_per_s / MEMORY_SHARE,
        link=link if measured is not None else gpu.link,
    )


def lookup_rates(gpu: str, *, folder: Path | None = None) -> MeasuredRates | None:
    """What was measured last, or None.

    Args:
        gpu: its name in the table.
        folder: in place of the usual one.
    """
    try:
        content = json.loads(_path(gpu, folder).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            return None
        rates = _RATES.validate_python(content)
    except (OSError, ValueError):  # pydantic's own error is a ValueError
        return None
    return rates if _is_sound(rates) else None


def store_rates(rates: MeasuredRates, *, folder: Path | None = None) -> Path:
    """Keeps a measurement; links among other numbers of GPUs stay as they were measured before.

    Raises:
        OSError: the folder cannot be written.
    """
    before = lookup_rates(rates.gpu, folder=folder)
    links = ({} if before is None else before.link_bytes_per_s) | rates.link_bytes_per_s
    path = _path(rates.gpu, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **asdict(replace(rates, link_bytes_per_s=links))}, indent=1)
    replace_file(path, text + "\n")
    return path


def _is_sound(rates: MeasuredRates) -> bool:
    figures = [*rates.product_flops_per_s.values(), rates.memory_bytes_per_s, *rates.link_bytes_per_s.values()]
    return all(0 < figure < 1e18 for figure in figures)


def _path(gpu: str, folder: Path | None) -> Path:
    return (folder or calibration_folder()) / f"rates-{normal_name(gpu)}.json"


def rated_gpu(gpu: Gpu, *, gpus_per_node: int, calibration: Calibration | None) -> Gpu:
    """The GPU with the rates that were measured here, if they were and no step was, which says more."""
    rates = None if calibration is not None else lookup_rates(gpu.name)
    return gpu if rates is None else as_measured(gpu, rates, gpus_per_node=gpus_per_node)
