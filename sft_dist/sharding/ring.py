"""Collectives by kind, and what a rank sends in one. Imports nothing."""

from __future__ import annotations

from typing import Literal

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "reduce", "all_to_all"]


def ring_factor(kind: Kind, size: int) -> float:
    """Bytes that a rank sends over those of the whole tensor: NCCL's "bus bandwidth" (nccl-tests, PERFORMANCE.md)."""
    others = (size - 1) / size
    return 2 * others if kind == "all_reduce" else 1.0 if kind == "reduce" else others
