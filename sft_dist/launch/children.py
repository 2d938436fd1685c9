"""Launchers that wait for a process of their own: what that process returned, and that no signal is lost on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class Children:
    """Processes that were started meanwhile, in order, and the signals that this process received for them."""

    processes: list[subprocess.Popen[Any]] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)

    @property
    def last_code(self) -> int:
        """Of the process that was started last; negative where a signal ended it."""
        return int(self.processes[-1].wait()) if self.processes else 0


@contextmanager
def watched_children() -> Iterator[Children]:
    """Keeps what ``subprocess`` starts in sight, and forwards SIGINT and SIGTERM to it.

    DeepSpeed's and Accelerate's functions wait for a process that they do not hand out. A signal that ends this process
    alone would leave that one, and the training below it, running; and DeepSpeed takes a launcher that a signal ended
    for one that went well.
    """
    children = Children()
    original = subprocess.Popen

    class Watched(original):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            children.processes.append(self)

    def forward(number: int, _: FrameType | None) -> None:
        alive = [process for process in children.processes if process.poll() is None]
        if not alive:
            sys.exit(128 + number)
        children.signals.append(number)
        for process in alive:
            process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    subprocess.Popen = Watched  # type: ignore[misc]
    try:
        yield children
    finally:
        subprocess.Popen = original  # type: ignore[misc]
        for number, handler in handlers.items():
            signal.signal(number, handler)
