"""What a run has cost so far, and what it will have: wall time times the price of its machines. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.plan.cost import SECONDS_PER_HOUR, exchange_rate, plan_cost
from sft_dist.plan.machines import Machines
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.result import Range


@dataclass(frozen=True)
class HourlyPrice:
    """Of all machines of a run together.

    Args:
        usd: an hour; GPUs that are rented with those of the run and idle are in it.
        name: of the offer, as in the plan.
    """

    usd: float
    jpy_per_usd: float
    name: str

    def usd_of(self, seconds: float) -> float:
        return self.usd * seconds / SECONDS_PER_HOUR

    def both(self, usd: float) -> str:
        """``$1.23 (¥184)``."""
        return f"{format_usd(usd)} ({format_jpy(usd * self.jpy_per_usd)})"


def hourly_price(hardware: HardwareConfig, machines: Machines | None, *, num_processes: int) -> HourlyPrice | None:
    """The price that the plan counts with; None where none is known.

    Args:
        machines: None: a CPU, or a GPU that is not in the table. It has a price only if the user says what it costs: of
            each process.

    Raises:
        ConfigError, UnknownHardware: as ``plan_cost``.
    """
    if machines is None:
        if hardware.price_per_hour is None and hardware.price_per_hour_jpy is None:
            return None
        rate, _ = exchange_rate(hardware)
        each = hardware.price_per_hour
        if each is None:
            assert hardware.price_per_hour_jpy is not None
            each = hardware.price_per_hour_jpy / rate
        return HourlyPrice(each * num_processes, rate, "your price")
    cost = plan_cost(
        machines.gpu,
        hardware=hardware,
        num_gpus=machines.num_gpus,
        nodes=machines.nodes,
        gpus_per_node=machines.gpus_per_node,
        total_s=Range(SECONDS_PER_HOUR, SECONDS_PER_HOUR, SECONDS_PER_HOUR),
        epochs=1,
        tokens=1,
    )
    if cost.chosen is None:
        return None
    return HourlyPrice(cost.chosen.usd.value, cost.jpy_per_usd, cost.chosen.name)


def running_bill(price: HourlyPrice, *, spent_usd: float, to_finish_s: float, usd_per_million_tokens: float) -> str:
    """The bill in the line of a running step: ``spent $1.23 (¥184), $4.56 (¥684) to finish, $0.12 per 1M tokens``."""
    return (
        f"spent {price.both(spent_usd)}, {price.both(price.usd_of(to_finish_s))} to finish, "
        f"{format_usd(usd_per_million_tokens)} per 1M tokens"
    )
