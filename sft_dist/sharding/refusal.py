"""What a declaration says of parts of a run that do not go together."""

from __future__ import annotations

from typing import NamedTuple

from sft_dist.config.describe import join_or


class Refusal(NamedTuple):
    """Why not, and what to do about it, a line each."""

    why: str
    fix: str


def processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def divisors(number: int) -> str:
    """``1, 2 or 4``."""
    return join_or([str(n) for n in range(1, number + 1) if number % n == 0])


def on_a_multiple_of(count: int) -> str:
    return f"run on a multiple of {count} processes (config check: --processes)"
