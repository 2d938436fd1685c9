"""Time limits as sbatch reads and writes them."""

from __future__ import annotations

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400


def seconds_of_limit(text: str) -> int:
    """Of ``90`` (minutes), ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` or ``D-HH:MM:SS``: sbatch(1)."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(days) * DAY_S + hours * HOUR_S + minutes * MINUTE_S + seconds
    if len(parts) == 3:
        return parts[0] * HOUR_S + parts[1] * MINUTE_S + parts[2]
    minutes, seconds = (*parts, 0)[:2]
    return minutes * MINUTE_S + seconds


def limit_of_seconds(seconds: int) -> str:
    """``HH:MM:SS``, or ``D-HH:MM:SS`` from a day on."""
    days, rest = divmod(seconds, DAY_S)
    clock = f"{rest // HOUR_S:02}:{rest % HOUR_S // MINUTE_S:02}:{rest % MINUTE_S:02}"
    return f"{days}-{clock}" if days else clock


def rounded_up(seconds: float) -> int:
    """To 5 minutes below 2 hours, to 30 minutes below a day, else to hours: a limit that people would write."""
    unit = 5 * MINUTE_S if seconds <= 2 * HOUR_S else 30 * MINUTE_S if seconds <= DAY_S else HOUR_S
    return int(-(-seconds // unit) * unit)
