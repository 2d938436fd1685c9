"""What tests have measured, for the end of the run: collected in every process that runs tests, printed by one."""

from __future__ import annotations

import statistics

# (duration, function) of every cell that a warm world has run.
cell_seconds: list[tuple[float, str]] = []

# Lines as they are printed.
lines: list[str] = []


def summary() -> list[str]:
    """Everything that was collected, as lines."""
    if not cell_seconds:
        return lines
    seconds = [duration for duration, _ in cell_seconds]
    slowest, where = max(cell_seconds)
    cells = (
        f"warm worlds: {len(seconds)} cells, median {statistics.median(seconds):.2f} s, "
        f"{sum(s <= 2 for s in seconds) / len(seconds):.0%} within 2 s, slowest {slowest:.1f} s ({where})"
    )
    return [*lines, cells]
