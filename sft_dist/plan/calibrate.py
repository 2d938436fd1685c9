"""``sft-dist calibrate``: measures this machine's GPU, shows it beside the table, and keeps it for plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from sft_dist.errors import ConfigError
from sft_dist.hardware.gpus import ComputeDtype, Gpu, find_gpu
from sft_dist.plan import benchmark
from sft_dist.plan.measured_rates import MeasuredRates, store_rates
from sft_dist.plan.rates import MEMORY_SHARE, link_share
from sft_dist.runtime.process_group import device_of, join, process_group
from sft_dist.runtime.world import World
from sft_dist.sharding.ring import Kind

RINGS: tuple[Kind, ...] = ("all_gather", "all_reduce")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        shapes: of products (m, n, k); copy_bytes, ring_bytes: that are copied, and gathered or reduced.
        repeats: of each measurement, whose median counts.
    """

    shapes: Sequence[tuple[int, int, int]] = benchmark.SHAPES
    copy_bytes: int = benchmark.COPY_BYTES
    ring_bytes: int = benchmark.COLLECTIVE_BYTES
    repeats: int = benchmark.REPEATS


FULL_EFFORT = Effort()


def calibrate(gpu: str | None) -> None:
    """Measures the GPUs of this launch, or the one of this process.

    Args:
        gpu: what the GPU is in the table; None: as its driver says.

    Raises:
        ConfigError: there is no GPU, or the launch spans several nodes.
        UnknownHardware: the GPU is not in the table.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "calibrate measures a GPU, and this machine has none",
            fix="run it where you train; plans for other machines need no calibration",
        )
    world = World.from_environment()
    if world.shape.num_nodes > 1:
        raise ConfigError(
            f"calibrate measures one node, and this launch has {world.shape.num_nodes}",
            fix="launch it on one of them; hardware.network says what joins nodes",
        )
    device = device_of(world)
    known = find_gpu(gpu or torch.cuda.get_device_name(device))
    with process_group(world, device, join(world)):
        rates = measure(known, device, num_gpus=world.size)
    if world.is_main:
        console = Console(highlight=False)
        console.print(compared(known, rates, num_gpus=world.size))
        try:
            path = store_rates(rates)
        except OSError as error:
            raise ConfigError(
                f"the calibration cannot be kept: {error}", fix="set SFT_DIST_CACHE to a folder that can be written to"
            ) from error
        console.print(f"kept in {path}: plans for {known.name} take these figures from now on", soft_wrap=True)


def measure(gpu: Gpu, device: torch.device, *, num_gpus: int, effort: Effort = FULL_EFFORT) -> MeasuredRates:
    """Every process of the default group calls it.

    Args:
        device: that stands for ``gpu``.
        num_gpus: of the group; links are measured where there are several.
    """
    dtypes: list[ComputeDtype] = list(gpu.flops)
    links = {}
    if num_gpus > 1:
        # The slower one: a plan knows one rate of a link.
        rings = (
            benchmark.ring_rate(device, kind, size_bytes=effort.ring_bytes, repeats=effort.repeats) for kind in RINGS
        )
        links[num_gpus] = min(rings)
    return MeasuredRates(
        gpu=gpu.name,
        product_flops_per_s={
            dtype: benchmark.best_product(device, dtype, shapes=effort.shapes, repeats=effort.repeats)
            for dtype in dtypes
        },
        memory_bytes_per_s=benchmark.copy_rate(device, size_bytes=effort.copy_bytes, repeats=effort.repeats),
        link_bytes_per_s=links,
        date=datetime.now(UTC).date().isoformat(),
        versions={"torch": version("torch")},
    )


def compared(gpu: Gpu, rates: MeasuredRates, *, num_gpus: int) -> Table:
    """What was measured beside what plans took before."""
    table = Table(title=gpu.name, title_justify="left", box=None)
    for heading in ("", "table", "measured", "measured/table"):
        table.add_column(heading, justify="right" if heading else "left")

    def add(what: str, before: float, now: float, unit: str) -> None:
        table.add_row(what, f"{before:,.1f} {unit}", f"{now:,.1f} {unit}", f"{now / before:.2f}")

    for dtype, rate in rates.product_flops_per_s.items():
        add(f"products in {dtype}", gpu.achievable_flops[dtype] / 1e12, rate / 1e12, "TFLOP/s")
    add("memory, copied", gpu.memory_bandwidth * MEMORY_SHARE / 1e9, rates.memory_bytes_per_s / 1e9, "GB/s")
    if num_gpus in rates.link_bytes_per_s:
        before = gpu.link_bytes_per_s(num_gpus) * link_share(gpu.link_among(num_gpus))
        add(f"link among {num_gpus}", before / 1e9, rates.link_bytes_per_s[num_gpus] / 1e9, "GB/s")
    return table
