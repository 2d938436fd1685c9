"""What tests have measured, for the end of the run: collected in every process that runs tests, printed by one."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

# (duration, function) of every cell that a warm world has run.
cell_seconds: list[tuple[float, str]] = []

# (what was compared, largest relative difference of a loss or norm from that of the reference).
differences: list[tuple[str, float]] = []

# Lines as they are printed.
lines: list[str] = []


def difference(kind: str, actual: Any, expected: Any) -> None:
    """Notes by how much two arrays of the same shape differ."""
    a, b = np.asarray(actual), np.asarray(expected)
    differences.append((kind, float(np.max(np.abs(a - b) / np.abs(b)))))


def summary() -> list[str]:
    """Everything that was collected, as lines."""
    result = list(lines)
    for kind in sorted({kind for kind, _ in differences}):
        found = [value for each, value in differences if each == kind]
        result.append(f"{kind}: {len(found)} runs, losses and norms within {max(found):.1e} of the reference")
    if not cell_seconds:
        return result
    seconds = [duration for duration, _ in cell_seconds]
    slowest, where = max(cell_seconds)
    cells = (
        f"warm worlds: {len(seconds)} cells, median {statistics.median(seconds):.2f} s, "
        f"{sum(s <= 2 for s in seconds) / len(seconds):.0%} within 2 s, slowest {slowest:.1f} s ({where})"
    )
    return [*result, cells]
