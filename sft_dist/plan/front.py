"""What the points of a search answer: the front of money and time, and the best under a budget or a deadline.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sft_dist.errors import ConfigError, PlanError
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.result import ParetoPoint, Pick
from sft_dist.plan.units import DAY_S, HOUR_S, MINUTE_S, duration
from sft_dist.plan.words import overrides

_NUMBER = r"(\d[\d_,]*(?:\.\d+)?)"
_BUDGET = re.compile(rf"([$¥￥]?)\s*{_NUMBER}([kKmM]?)\s*(usd|jpy|yen|円)?", re.IGNORECASE)
_DEADLINE = re.compile(rf"(?:{_NUMBER}\s*([dhm])(?:ays?|ours?|in|inutes?|ay|our)?\s*)+", re.IGNORECASE)
_STEP = re.compile(rf"{_NUMBER}\s*([dhm])", re.IGNORECASE)
_SECONDS = {"d": DAY_S, "h": HOUR_S, "m": MINUTE_S}


@dataclass(frozen=True)
class Budget:
    """Most that a run may cost."""

    amount: float
    currency: Literal["USD", "JPY"]

    def __str__(self) -> str:
        return format_usd(self.amount) if self.currency == "USD" else format_jpy(self.amount)

    def cost(self, point: ParetoPoint) -> float:
        """Of a point, in the budget's currency."""
        return point.usd if self.currency == "USD" else point.jpy


def parse_budget(text: str) -> Budget:
    """``50``, ``$50``, ``50 USD``, ``¥8000``, ``8_000 JPY``, ``1.5k``: US dollars unless said otherwise.

    Raises:
        ConfigError: it is no amount of money.
    """
    found = _BUDGET.fullmatch(text.strip())
    sign, unit = ("", "") if found is None else (found[1], (found[4] or "").lower())
    is_yen = sign in ("¥", "￥") or unit in ("jpy", "yen", "円")
    if found is None or (sign == "$" and is_yen) or (unit == "usd" and is_yen):
        raise ConfigError(f"--budget {text} is no amount of money", fix="write it as 50, $50 or ¥8000")
    amount = float(re.sub("[_,]", "", found[2])) * {"": 1, "k": 1e3, "m": 1e6}[found[3].lower()]
    if amount <= 0:
        raise ConfigError(f"--budget {text}: nothing is to be had for that", fix="state more than 0, e.g. $50")
    return Budget(amount, "JPY" if is_yen else "USD")


def parse_deadline(text: str, *, option: str = "--deadline") -> float:
    """Seconds of ``6h``, ``90m``, ``1h30m``, ``2.5 days``.

    Args:
        option: that it was given to.

    Raises:
        ConfigError: it is no length of time.
    """
    if _DEADLINE.fullmatch(text.strip()) is None:
        raise ConfigError(f"{option} {text} is no length of time", fix="write it as 6h, 90m, 1h30m or 2d")
    seconds = sum(float(re.sub("[_,]", "", number)) * _SECONDS[unit.lower()] for number, unit in _STEP.findall(text))
    if seconds <= 0:
        raise ConfigError(f"{option} {text}: that is no time", fix="state more than 0, e.g. 6h")
    return seconds


def front_of(points: Iterable[ParetoPoint]) -> list[ParetoPoint]:
    """Those that fit of which none is both cheaper and faster, the cheapest first; of equal ones the first."""
    found: list[ParetoPoint] = []
    for point in sorted((p for p in points if p.fits), key=lambda p: (p.usd, p.hours)):
        if not found or point.hours < found[-1].hours:
            found.append(replace(point, on_front=True))
    return found


def picks_of(
    front: Sequence[ParetoPoint], *, budget: Budget | None = None, deadline_s: float | None = None
) -> tuple[Pick, ...]:
    """What was asked for, as far as there is something: the best ones are always on the front."""
    if not front:
        return ()
    found = [Pick("cheapest that fits", front[0]), Pick("fastest that fits", front[-1])]
    if budget is not None:
        within = [point for point in front if budget.cost(point) <= budget.amount]
        found += [Pick(f"fastest for at most {budget}", point) for point in within[-1:]]
    if deadline_s is not None:
        within = [point for point in front if point.hours * HOUR_S <= deadline_s]
        found += [Pick(f"cheapest within {duration(deadline_s)}", point) for point in within[:1]]
    return tuple(found)


def check_wishes(
    front: Sequence[ParetoPoint], *, budget: Budget | None = None, deadline_s: float | None = None
) -> None:
    """
    Raises:
        PlanError: nothing fits, or nothing under the budget or the deadline; with what is nearest to it.
    """
    if not front:
        raise PlanError(
            "nothing that was searched fits",
            fix="search further: --max-gpus, --methods all, hardware.gpu=null for all GPUs that have a price",
        )
    cheapest, fastest = front[0], front[-1]
    if budget is not None and budget.cost(cheapest) > budget.amount:
        cost = format_usd(cheapest.usd) if budget.currency == "USD" else format_jpy(cheapest.jpy)
        raise PlanError(
            f"nothing that fits costs at most {budget}: the cheapest costs {cost} and takes "
            f"{duration(cheapest.hours * HOUR_S)}",
            fix=f"raise --budget, search with --methods all, or take it: {_pasted(cheapest)}",
        )
    if deadline_s is not None and fastest.hours * HOUR_S > deadline_s:
        raise PlanError(
            f"nothing that fits takes at most {duration(deadline_s)}: the fastest takes "
            f"{duration(fastest.hours * HOUR_S)} and costs {format_usd(fastest.usd)}",
            fix=f"raise --deadline or --max-gpus, search with --methods all, or take it: {_pasted(fastest)}",
        )


def _pasted(point: ParetoPoint) -> str:
    return " ".join(overrides(point.overrides)) or "the configuration as it is"
