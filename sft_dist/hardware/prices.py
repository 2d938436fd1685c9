"""What machines with GPUs cost by the hour, and what a dollar costs in yen, each with its date and source.

``prices.yaml`` is what comes with the package; a file of the user's (``hardware.prices``) adds rows and replaces some.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sft_dist.errors import ConfigError, SftError
from sft_dist.hardware.gpus import Gpu, find_gpu
from sft_dist.hardware.tables import check_keys, shipped_table, user_table

PriceKind = Literal["on demand", "spot"]

HOURS = {"hour": 1, "year": 8760}

REQUIRED = ("provider", "machine", "gpu", "gpus")
KEYS = (
    *REQUIRED,
    *("region", "any_count", "currency", "per", "on_demand", "spot", "vcpu", "ram_gib", "disk_gb"),
    *("terms", "source", "as_of", "note"),
)


@dataclass(frozen=True)
class Price:
    """A machine by the hour.

    Args:
        gpu: name in the table of GPUs; gpus: how many the machine has.
        any_count: priced by the GPU: a machine with any number of them costs that many times as much.
        per_hour: in ``currency``; the middle of ``low`` and ``high``, between which spot prices moved.
        terms: who may rent it, or for how long at least; None: anybody by the hour.
        vcpu, ram_gib, disk_gb: of the machine, where known.
        source: what the figure was read from; as_of: what that says of its date.
    """

    provider: str
    machine: str
    region: str
    gpu: str
    gpus: int
    kind: PriceKind
    currency: Literal["USD", "JPY"]
    per_hour: float
    low: float
    high: float
    as_of: str
    source: str
    any_count: bool = False
    vcpu: int | None = None
    ram_gib: float | None = None
    disk_gb: float | None = None
    terms: str | None = None
    note: str = ""

    def usd_per_hour(self, jpy_per_usd: float) -> tuple[float, float, float]:
        """(middle, low, high) of the whole machine."""
        rate = jpy_per_usd if self.currency == "JPY" else 1.0
        return self.per_hour / rate, self.low / rate, self.high / rate


@dataclass(frozen=True)
class ExchangeRate:
    jpy_per_usd: float
    as_of: str
    source: str


@cache
def shipped_prices() -> tuple[Price, ...]:
    """Every price of ``prices.yaml``."""
    return tuple(_prices(shipped_table("prices.yaml"), file="prices.yaml"))


def all_prices(user_file: str | None = None) -> tuple[Price, ...]:
    """The shipped prices and the user's; a machine that the user names has the user's prices only.

    Raises:
        ConfigError: the user's file cannot be read or a row of it is wrong.
    """
    if user_file is None:
        return shipped_prices()
    own = tuple(_prices(user_table(user_file), file=user_file))
    replaced = {_place(price) for price in own}
    return (*own, *(price for price in shipped_prices() if _place(price) not in replaced))


def prices_of(gpu: Gpu, *, user_file: str | None = None) -> tuple[Price, ...]:
    """Every price of machines with this GPU."""
    return tuple(price for price in all_prices(user_file) if price.gpu == gpu.name)


def latest_rate(user_file: str | None = None) -> ExchangeRate:
    """The newest exchange rate of the user's file, else of the table."""
    own = _rates(user_table(user_file), file=user_file) if user_file is not None else []
    rates = own or _rates(shipped_table("prices.yaml"), file="prices.yaml")
    return max(rates, key=lambda rate: rate.as_of)


def _place(price: Price) -> tuple[str, str, str, str]:
    return price.provider, price.machine, price.region, price.gpu


def _rates(table: dict[str, Any], *, file: str) -> list[ExchangeRate]:
    rates = []
    for i, row in enumerate(table.get("exchange_rates", [])):
        place = f"{file}: exchange_rates.{i}"
        keys = ("date", "jpy_per_usd")
        check_keys(row, allowed=(*keys, "source"), required=keys, place=place)
        rate = _positive(row["jpy_per_usd"], place=f"{place}.jpy_per_usd")
        rates.append(ExchangeRate(rate, str(row["date"]), _source(table, row, file=file)[0]))
    return rates


def _prices(table: dict[str, Any], *, file: str) -> Iterator[Price]:
    allowed = ("sources", "exchange_rates", "prices")
    check_keys(table, allowed=allowed, required=(), place=file)
    for i, row in enumerate(table.get("prices", [])):
        place = f"{file}: prices.{i}"
        if not isinstance(row, dict):
            raise ConfigError(f"{place} is {row!r}", fix=f"write {{{', '.join(REQUIRED)}, on_demand}}")
        check_keys(row, allowed=KEYS, required=REQUIRED, place=place)
        if "on_demand" not in row and "spot" not in row:
            raise ConfigError(f"{place}: there is no price", fix="add on_demand or spot")
        if "on_demand" in row:
            price = _positive(row["on_demand"], place=f"{place}.on_demand")
            yield _price(table, row, "on demand", (price, price), file=file, place=place)
        if "spot" in row:
            spot = row["spot"] if isinstance(row["spot"], list) else [row["spot"]] * 2
            low, high = (_positive(bound, place=f"{place}.spot") for bound in (min(spot), max(spot)))
            yield _price(table, row, "spot", (low, high), file=file, place=place)


def _price(
    table: dict[str, Any], row: dict[str, Any], kind: PriceKind, bounds: tuple[float, float], *, file: str, place: str
) -> Price:
    per, currency = row.get("per", "hour"), row.get("currency", "USD")
    if per not in HOURS:
        raise ConfigError(f"{place}.per is {per!r}", fix=f"set it to {' or '.join(HOURS)}")
    if currency not in ("USD", "JPY"):
        raise ConfigError(f"{place}.currency is {currency!r}", fix="set it to USD or JPY")
    if not isinstance(row["gpus"], int) or row["gpus"] < 1:
        raise ConfigError(f"{place}.gpus is {row['gpus']!r}", fix="set it to a whole number >= 1")
    try:
        gpu = find_gpu(row["gpu"])
    except SftError as error:
        raise ConfigError(f"{place}.gpu: {error.what}", fix=error.fix) from None
    low, high = (bound / HOURS[per] for bound in bounds)
    source, as_of = _source(table, row, file=file)
    return Price(
        provider=str(row["provider"]),
        machine=str(row["machine"]),
        region=str(row.get("region", "")),
        gpu=gpu.name,
        gpus=row["gpus"],
        kind=kind,
        currency=currency,
        per_hour=(low + high) / 2,
        low=low,
        high=high,
        as_of=as_of,
        source=source,
        any_count=bool(row.get("any_count", False)),
        vcpu=row.get("vcpu"),
        ram_gib=row.get("ram_gib"),
        disk_gb=row.get("disk_gb"),
        terms=row.get("terms"),
        note=row.get("note", ""),
    )


def _source(table: dict[str, Any], row: dict[str, Any], *, file: str) -> tuple[str, str]:
    """(text, date) of a row: those of its source, else its own words, else the file."""
    key = row.get("source", file)
    known = table.get("sources", {}).get(key, {"text": key, "as_of": "not dated"})
    return str(known["text"]), str(row.get("as_of", known["as_of"]))


def _positive(value: Any, *, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{place} is {value!r}", fix="set it to a number > 0")
    return float(value)
