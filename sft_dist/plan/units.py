"""Bytes, times, amounts of money and their ranges as people read them; the same in every view. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from sft_dist.plan.result import Range

GIB = 2**30
MIB = 2**20

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400


def gib(size: float) -> str:
    """Bytes for people: GiB, or MiB where those would be 0.0."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / MIB:,.1f} MiB"


def gib_range(size: Range) -> str:
    """``61.3 (58.8-63.9) GiB``: all three in the unit of the value."""
    scale, unit = (GIB, "GiB") if size.value >= GIB / 10 else (MIB, "MiB")
    return f"{ranged(size.scaled(1 / scale), '{:,.1f}'.format)} {unit}"


def ranged(figure: Range, text: Callable[[float], str]) -> str:
    """``12.3 (11.0-14.1)``; the value alone where both ends read like it."""
    value, low, high = text(figure.value), text(figure.low), text(figure.high)
    return value if low == value == high else f"{value} ({low}-{high})"


def duration(seconds: float) -> str:
    """``4.2 s``, ``45 s``, ``20 min``, ``3 h 20 min``, ``2.3 days``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < MINUTE_S - 0.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / MINUTE_S)
    if minutes < HOUR_S // MINUTE_S:
        return f"{minutes} min"
    if minutes < DAY_S // MINUTE_S:
        return f"{minutes // 60} h {minutes % 60} min"
    return _days(seconds) + " days"


def duration_range(seconds: Range) -> str:
    """``22 (20-25) min``, ``3 h 20 min (3 h 2 min-4 h 1 min)``, ``2.3 (2.1-2.6) days``."""
    if duration(seconds.value).endswith("days"):
        return f"{ranged(seconds, _days)} days"
    unit = duration(seconds.value).rpartition(" ")[2]
    texts = [duration(each) for each in (seconds.value, seconds.low, seconds.high)]
    if all(text.count(" ") == 1 and text.endswith(f" {unit}") for text in texts):
        return f"{ranged(seconds, lambda each: duration(each).split()[0])} {unit}"
    return ranged(seconds, duration)


def _days(seconds: float) -> str:
    return f"{seconds / DAY_S:,.1f}"


def step_seconds(seconds: float) -> str:
    """Seconds of a step or of a part of one: ``12.3 s``, ``0.213 s``."""
    return f"{_seconds(seconds)} s"


def step_range(seconds: Range) -> str:
    """``12.3 (11.0-14.1) s``: all three with the decimals of the value."""
    decimals = _decimals(seconds.value)
    return f"{ranged(seconds, lambda value: f'{value:,.{decimals}f}')} s"


def _seconds(value: float) -> str:
    return f"{value:,.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    return 1 if value >= 10 else 2 if value >= 1 else 3


def count(number: float) -> str:
    """``9,876``, ``412,345``, ``41.2 M``, ``1.23 B``."""
    for size, unit, decimals in ((1e9, "B", 2), (1e6, "M", 1)):
        if number >= size:
            return f"{number / size:,.{decimals}f} {unit}"
    return f"{number:,.0f}"


def rate(per_second: float) -> str:
    """Tokens per second, without the unit: ``12,345``, ``87.2``."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:,.1f}"


def percent(share: float) -> str:
    """``38%``, ``0.4%``, ``<0.1%``: a share between 0 and 1."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%" if 0 < share < 0.0095 else f"{100 * share:.0f}%"
