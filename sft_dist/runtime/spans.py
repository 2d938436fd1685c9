"""The parts of a training step, by name, for a trace of it; without one they cost a look at a flag."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["data", "forward", "backward", "loss of all ranks", "update"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "loss of all ranks", "update")
PREFIX = "sft_dist: "


class _Trace:
    is_on = False


_trace = _Trace()


@contextmanager
def span(part: Part) -> Iterator[None]:
    """What happens in this block is that part of a step."""
    if not _trace.is_on:
        yield
        return
    from torch.profiler import record_function

    with record_function(PREFIX + part):
        yield


@contextmanager
def traced() -> Iterator[None]:
    """Within it spans are recorded."""
    _trace.is_on = True
    try:
        yield
    finally:
        _trace.is_on = False
