"""Processes that a launcher waits for: what they returned, and that no signal is lost on the way to them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psutil

from sft_dist.launch.outcome import code_of_signal

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Process = subprocess.Popen[Any]


@dataclass
class Children:
    """Processes that were started meanwhile, in order, and the signals that this process received for them.

    Args:
        is_launcher: whether a process only starts those that train: then these get the signals, not it.
    """

    is_launcher: Callable[[Process], bool] = lambda _: False
    processes: list[Process] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    _held: list[int] | None = None

    @property
    def last_code(self) -> int:
        """Of the process that was started last; negative where a signal ended it."""
        return int(self.processes[-1].wait()) if self.processes else 0

    def receive(self, number: int) -> None:
        """Sends a signal on to those that are alive; where none was started yet, this process ends."""
        if self._held is not None:
            self._held.append(number)
            return
        if not self.processes:
            sys.exit(code_of_signal(number))
        self.signals.append(number)
        for process in self.processes:
            if process.poll() is None:
                self._send(process, number)

    def _send(self, process: Process, number: int) -> None:
        trainers = psutil.Process(process.pid).children() if self.is_launcher(process) else []
        for target in trainers or [process]:
            with suppress(psutil.NoSuchProcess):
                target.send_signal(number)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While processes are being started: a signal that comes meanwhile reaches them when all are there."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
        for number in held:
            self.receive(number)


@contextmanager
def watched_children(
    *, is_launcher: Callable[[Process], bool] | None = None, numbers: Sequence[signal.Signals] = FORWARDED
) -> Iterator[Children]:
    """Keeps what ``subprocess`` starts in sight, and forwards signals to it; this process waits for its end.

    DeepSpeed's and Accelerate's functions wait for a process that they do not hand out. A signal that ends this process
    alone would leave that one, and the training below it, running; and DeepSpeed takes a launcher that a signal ended
    for one that went well.

    Args:
        is_launcher: as of ``Children``. Such a process gets a session of its own, so that a terminal's Ctrl-C reaches
            it, and those that it started, through this process alone.
        numbers: what is forwarded; what this process was started to ignore stays ignored, but for SIGUSR1.
    """
    children = Children() if is_launcher is None else Children(is_launcher)
    original = subprocess.Popen

    class Watched(original):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            if is_launcher is not None:
                keywords["start_new_session"] = True
            with children.starting():
                super().__init__(*arguments, **keywords)
                children.processes.append(self)

    def forward(number: int, _: FrameType | None) -> None:
        children.receive(number)

    # A script that hides SIGUSR1 from its launcher (trap '' USR1) means the launcher, not the training.
    wanted = [n for n in numbers if n == signal.SIGUSR1 or signal.getsignal(n) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, forward) for number in wanted}
    subprocess.Popen = Watched  # type: ignore[misc]
    try:
        yield children
    finally:
        subprocess.Popen = original  # type: ignore[misc]
        for number, handler in handlers.items():
            signal.signal(number, handler)
