"""What tests have measured, for the end of the run: collected in every process that runs tests, printed by one."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

# Of what was told, in a table.
TOLD_CHARACTERS = 150

# (duration, function) of every cell that a warm world has run.
cell_seconds: list[tuple[float, str]] = []

# (what was compared, largest relative difference of a loss or norm from that of the reference).
differences: list[tuple[str, float]] = []

# Lines as they are printed.
lines: list[str] = []

# (what was planted, seconds until it was told or all processes were gone, exit codes by rank, what was told).
faults: list[tuple[str, float, list[int | None], str]] = []


def difference(kind: str, actual: Any, expected: Any) -> None:
    """Notes by how much two arrays of the same shape differ."""
    a, b = np.asarray(actual), np.asarray(expected)
    differences.append((kind, float(np.max(np.abs(a - b) / np.abs(b)))))


def fault(planted: str, seconds: float, codes: list[int | None], told: str) -> None:
    """Notes how a run met what was planted in it."""
    faults.append((planted, seconds, codes, told))


def _faults() -> list[str]:
    """A table."""
    if not faults:
        return []
    width = max(len(planted) for planted, *_ in faults)
    rows = [
        f"{planted:{width}}  {seconds:5.1f} s  {' '.join(map(str, codes)):8}  {told[:TOLD_CHARACTERS]}"
        for planted, seconds, codes, told in sorted(faults)
    ]
    slowest = max(seconds for _, seconds, *_ in faults)
    return [*rows, f"{len(rows)} planted faults, each told or ended within {slowest:.1f} s"]


def summary() -> list[str]:
    """Everything that was collected, as lines."""
    result = [*lines, *_faults()]
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
