"""What a run costs: rented, on a price of one's own, or on machines of one's own by the kWh. Imports no torch.

Machines are rented whole: two GPUs from a provider that sells eight together cost eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.config.hardware_schema import HardwareConfig, OwnedHardware
from sft_dist.errors import ConfigError, UnknownHardware
from sft_dist.hardware.gpus import Gpu
from sft_dist.hardware.prices import Price, PriceKind, all_prices, latest_rate
from sft_dist.hardware.tables import did_you_mean
from sft_dist.plan.result import Assumption, CostPlan, Offer, Range

SECONDS_PER_HOUR = 3600

# Power of a machine in training, its host and fans with it, over what its GPUs are sold for (TDP). Measured on nodes of
# eight H100 (5.6 kW of GPUs, rated 10.2 kW): intensive training takes 76 % of the rating (arXiv 2506.14551), at most
# 8.4 kW (arXiv 2412.08602). The low end is the GPUs at their limit without a host.
POWER_OVER_TDP = Range(value=0.76 * 10.2 / 5.6, low=1.0, high=8.4 / 5.6)
POWER_SOURCE = "measured on nodes of eight H100: arXiv 2506.14551, arXiv 2412.08602"

# Providers that price by the GPU put at most so many into one machine.
MOST_GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class _Rental:
    """Machines of one price that hold the run."""

    price: Price
    machines: int
    gpus_billed: int
    holds_nodes: bool  # whether a machine has the GPUs of a node; else a node is spread over several


def plan_cost(
    gpu: Gpu,
    *,
    hardware: HardwareConfig,
    num_gpus: int,
    nodes: int,
    gpus_per_node: int,
    total_s: Range,
    epochs: float,
    tokens: float,
) -> CostPlan:
    """The bill of a run under every known price of its GPU.

    The chosen offer is the user's own price or electricity if there is one, else the cheapest of ``price_kind`` that
    anybody may rent by the hour; with ``hardware.provider`` the cheapest of that provider, whatever its terms.

    Args:
        num_gpus: that train; nodes, gpus_per_node: how they are laid out.
        total_s: wall time of the whole run, seconds.
        epochs, tokens: of the whole run, for the price of one and of a million.

    Raises:
        UnknownHardware: ``hardware.provider`` has no prices, or none of this GPU.
        ConfigError: the file ``hardware.prices`` is wrong, or ``hardware.owned`` has no price of a kWh.
    """
    rate, rate_as_of = exchange_rate(hardware)
    gpu_hours = total_s.scaled(num_gpus / SECONDS_PER_HOUR)
    energy_kwh = gpu_hours.value * gpu.tdp_w * POWER_OVER_TDP.value / 1000
    rentals = _rentals(gpu, hardware=hardware, num_gpus=num_gpus, nodes=nodes, gpus_per_node=gpus_per_node)
    rented = [(_rented(rental, num_gpus=num_gpus, total_s=total_s, rate=rate), rental) for rental in rentals]
    own = _own_offer(gpu, hardware, num_gpus=num_gpus, nodes=nodes, gpu_hours=gpu_hours, rate=rate)
    offers = sorted([offer for offer, _ in rented] + ([own] if own else []), key=lambda offer: offer.usd.value)
    chosen = own or _chosen(rented, hardware=hardware)
    usd = chosen.usd.value if chosen else None
    return CostPlan(
        gpu_hours=gpu_hours,
        offers=tuple(offers),
        chosen=chosen,
        usd_per_epoch=usd / epochs if usd is not None and epochs > 0 else None,
        usd_per_million_tokens=usd / tokens * 1e6 if usd is not None and tokens > 0 else None,
        energy_kwh=energy_kwh,
        jpy_per_usd=rate,
        fx_as_of=rate_as_of,
    )


def rents_nodes(gpu: Gpu, hardware: HardwareConfig, gpus_per_node: int) -> bool:
    """Whether the bill is the user's own, or somebody rents a machine with that many of this GPU.

    Raises:
        ConfigError: the file ``hardware.prices`` is wrong.
        UnknownHardware: ``hardware.provider`` has no prices at all.
    """
    own = (hardware.price_per_hour, hardware.price_per_hour_jpy, hardware.owned)
    if any(price is not None for price in own):
        return True
    kind: PriceKind = "spot" if hardware.price_kind == "spot" else "on demand"
    if not any(price.gpu == gpu.name and _is_of(price, hardware) for price in all_prices(hardware.prices)):
        return False
    rentals = [
        _rental(price, num_gpus=gpus_per_node, nodes=1, gpus_per_node=gpus_per_node)
        for price in _of_provider(gpu, hardware)
        if price.kind == kind
    ]
    return any(rental.holds_nodes for rental in rentals)


def _is_of(price: Price, hardware: HardwareConfig) -> bool:
    """Whether a price is of the provider that the user names, if it does."""
    return hardware.provider is None or price.provider.casefold().startswith(hardware.provider.casefold())


def cost_assumptions(gpu: Gpu, hardware: HardwareConfig) -> tuple[Assumption, ...]:
    """What a bill takes for granted, for the plan's list."""
    power = Assumption(
        f"machines take {POWER_OVER_TDP.value:.2f} ({POWER_OVER_TDP.low:.2f} to {POWER_OVER_TDP.high:.2f}) times the "
        f"{gpu.tdp_w:g} W of each GPU, hosts included",
        POWER_SOURCE,
    )
    if hardware.owned is not None:
        cooling = f"the building takes {hardware.owned.pue:g} times what its machines take; buying them is not counted"
        return power, Assumption(cooling, "hardware.owned.pue")
    if hardware.price_per_hour is not None or hardware.price_per_hour_jpy is not None:
        return (power,)
    whole = "machines are billed whole, for the time of the run only; storage, traffic and tax come on top"
    return power, Assumption(whole, "hardware/prices.yaml")


def exchange_rate(hardware: HardwareConfig) -> tuple[float, str]:
    """(JPY per USD, what it rests on)."""
    if hardware.fx is not None:
        return hardware.fx, "hardware.fx"
    rate = latest_rate(hardware.prices)
    return rate.jpy_per_usd, rate.as_of


def _own_offer(
    gpu: Gpu, hardware: HardwareConfig, *, num_gpus: int, nodes: int, gpu_hours: Range, rate: float
) -> Offer | None:
    """The offer by what the user says that a GPU costs, if it does."""
    if hardware.owned is not None:
        return _electricity(gpu, hardware.owned, num_gpus=num_gpus, nodes=nodes, gpu_hours=gpu_hours, rate=rate)
    if hardware.price_per_hour is not None:
        key, per_gpu_hour = "hardware.price_per_hour", hardware.price_per_hour
    elif hardware.price_per_hour_jpy is not None:
        key, per_gpu_hour = "hardware.price_per_hour_jpy", hardware.price_per_hour_jpy / rate
    else:
        return None
    usd = gpu_hours.scaled(per_gpu_hour)
    return Offer(
        name="your price",
        kind="yours",
        usd_per_gpu_hour=per_gpu_hour,
        machines=nodes,
        gpus_billed=num_gpus,
        usd=usd,
        jpy=usd.scaled(rate),
        as_of="your configuration",
        source=key,
    )


def _electricity(gpu: Gpu, owned: OwnedHardware, *, num_gpus: int, nodes: int, gpu_hours: Range, rate: float) -> Offer:
    """Machines of one's own: time, times power, times the price of a kWh."""
    if owned.price_per_kwh is not None:
        usd_per_kwh = owned.price_per_kwh
    elif owned.price_per_kwh_jpy is not None:
        usd_per_kwh = owned.price_per_kwh_jpy / rate
    else:
        raise ConfigError(
            "hardware.owned has no price of a kWh", fix="set hardware.owned.price_per_kwh or price_per_kwh_jpy"
        )
    # Of a GPU at its TDP; what its machine takes with it comes with the range of that.
    usd_per_tdp_hour = gpu.tdp_w / 1000 * owned.pue * usd_per_kwh
    usd = Range(
        gpu_hours.value * POWER_OVER_TDP.value * usd_per_tdp_hour,
        gpu_hours.low * POWER_OVER_TDP.low * usd_per_tdp_hour,
        gpu_hours.high * POWER_OVER_TDP.high * usd_per_tdp_hour,
    )
    return Offer(
        name="your machines, electricity only",
        kind="owned",
        usd_per_gpu_hour=POWER_OVER_TDP.value * usd_per_tdp_hour,
        machines=nodes,
        gpus_billed=num_gpus,
        usd=usd,
        jpy=usd.scaled(rate),
        as_of="your configuration",
        source="hardware.owned",
    )


def _rentals(gpu: Gpu, *, hardware: HardwareConfig, num_gpus: int, nodes: int, gpus_per_node: int) -> list[_Rental]:
    """For each provider, region, kind of price and terms the cheapest machines that hold the run.

    Machines with fewer GPUs than a node of the run are taken only where nobody has larger ones.
    """
    prices = _of_provider(gpu, hardware)
    rentals = [_rental(price, num_gpus=num_gpus, nodes=nodes, gpus_per_node=gpus_per_node) for price in prices]
    if any(rental.holds_nodes for rental in rentals):
        rentals = [rental for rental in rentals if rental.holds_nodes]
    best: dict[tuple[str, str, str, str | None], _Rental] = {}
    for rental in rentals:
        key = (rental.price.provider, rental.price.region, rental.price.kind, rental.price.terms)
        if key not in best or _per_hour(rental) < _per_hour(best[key]):
            best[key] = rental
    return list(best.values())


def _rental(price: Price, *, num_gpus: int, nodes: int, gpus_per_node: int) -> _Rental:
    if price.any_count and gpus_per_node <= MOST_GPUS_OF_A_MACHINE:
        return _Rental(price, machines=nodes, gpus_billed=nodes * gpus_per_node, holds_nodes=True)
    if price.gpus >= gpus_per_node:
        return _Rental(price, machines=nodes, gpus_billed=nodes * price.gpus, holds_nodes=True)
    machines = math.ceil(num_gpus / price.gpus)
    return _Rental(price, machines=machines, gpus_billed=machines * price.gpus, holds_nodes=False)


def _per_hour(rental: _Rental) -> float:
    """Of all machines together, in the price's currency."""
    return rental.price.per_hour / rental.price.gpus * rental.gpus_billed


def _of_provider(gpu: Gpu, hardware: HardwareConfig) -> list[Price]:
    """The prices of this GPU, of the one provider that the user names if it does."""
    prices = all_prices(hardware.prices)
    of_gpu = [price for price in prices if price.gpu == gpu.name]
    if hardware.provider is None:
        return of_gpu
    wanted = hardware.provider.casefold()
    providers = list(dict.fromkeys(price.provider for price in prices))
    matching = [name for name in providers if name.casefold().startswith(wanted)]
    if not matching:
        raise UnknownHardware(
            f"hardware.provider {hardware.provider!r} has no prices in the table",
            fix=f"{did_you_mean(hardware.provider, providers)} Or give your own with hardware.price_per_hour",
        )
    found = [price for price in of_gpu if price.provider in matching]
    if not found:
        others = list(dict.fromkeys(price.provider for price in of_gpu))
        raise UnknownHardware(
            f"hardware.provider {hardware.provider!r} has no price of a {gpu.name}",
            fix=f"set hardware.provider to {' or '.join(others)}" if others else "set hardware.price_per_hour",
        )
    return found


def _rented(rental: _Rental, *, num_gpus: int, total_s: Range, rate: float) -> Offer:
    price = rental.price
    middle, low, high = price.usd_per_hour(rate)
    gpu_hours = total_s.scaled(rental.gpus_billed / price.gpus / SECONDS_PER_HOUR)
    usd = Range(gpu_hours.value * middle, gpu_hours.low * low, gpu_hours.high * high)
    return Offer(
        name=_name(rental, num_gpus=num_gpus),
        kind=price.kind,
        usd_per_gpu_hour=middle / price.gpus,
        machines=rental.machines,
        gpus_billed=rental.gpus_billed,
        usd=usd,
        jpy=usd.scaled(rate),
        as_of=price.as_of,
        source=price.source,
    )


def _name(rental: _Rental, *, num_gpus: int) -> str:
    price = rental.price
    count = f"{rental.machines} x " if rental.machines > 1 else ""
    name = f"{price.provider} {count}{price.machine}" + (f", {price.region}" if price.region else "")
    remarks = []
    if rental.gpus_billed > num_gpus:
        remarks.append(f"{rental.gpus_billed} GPUs billed, {num_gpus} used")
    if not rental.holds_nodes:
        remarks.append(f"{price.gpus} GPU a machine: a node of the run is spread over several")
    if price.terms:
        remarks.append(price.terms)
    return name + (f" ({'; '.join(remarks)})" if remarks else "")


def _chosen(rented: Sequence[tuple[Offer, _Rental]], *, hardware: HardwareConfig) -> Offer | None:
    """The cheapest of the wanted kind; those that not anybody may rent by the hour only where there is no other."""
    kind: PriceKind = "spot" if hardware.price_kind == "spot" else "on demand"
    of_kind = [(offer, rental) for offer, rental in rented if offer.kind == kind]
    open_to_all = [offer for offer, rental in of_kind if rental.price.terms is None]
    wanted = open_to_all if open_to_all and hardware.provider is None else [offer for offer, _ in of_kind]
    return min(wanted, key=lambda offer: offer.usd.value, default=None)
