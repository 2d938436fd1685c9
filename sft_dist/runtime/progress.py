"""What this process has got done, counted: whoever does a small piece of work says so, and who watches sees it move.

Costs as much as adding 1, so it may stand in every loop. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

# What the main thread does within a phase: waits for its own micro-batch, or for what rank 0 alone does.
Part = Literal["", "data", "rank 0"]


@dataclass
class Progress:
    """Of this process.

    Args:
        pieces: of work that are done; only that it moves means something.
        part: what the main thread is doing now.
    """

    pieces: int = 0
    part: Part = ""


own = Progress()


def tick() -> None:
    """A piece of work is done: a micro-batch, a tensor, a block of a file."""
    own.pieces += 1


@contextmanager
def doing(part: Part) -> Iterator[None]:
    """What the main thread does in this block; its begin and its end are progress."""
    before = own.part
    own.part = part
    tick()
    try:
        yield
    finally:
        own.part = before
        tick()
