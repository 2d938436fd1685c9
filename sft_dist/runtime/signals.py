"""Signals that ask a run to stop: SIGTERM and SIGUSR1, which schedulers send, and SIGINT, which Ctrl-C sends.

While training lasts they mean "save, then stop": here they are only noted, the loop acts on them where all ranks agree
(``train/agreement.py``). Before and after, nothing is lost by ending at once: SIGINT and SIGTERM do what they always
do, SIGUSR1 ends the process with the code of a run that is to be started again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from sft_dist.errors import Preempted
from sft_dist.runtime.exit_notes import leave
from sft_dist.runtime.failure import INTERRUPTED_EXIT_CODE, report_interrupt

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# A terminal sends Ctrl-C to the launcher and to the processes, and the launcher sends it on: copies of one key press
# arrive within milliseconds. Only a later one is the user's second.
SECOND_INTERRUPT_S = 1.0

SAVING = "\nsaving a checkpoint at the end of a step; press Ctrl-C again to leave now\n"
NOTHING_TO_SAVE = "ended by SIGUSR1 while not training: there is nothing to save; go on with --resume auto\n"
SHOW_CURSOR = b"\x1b[?25h"


class Signals:
    """Listens while the context lasts; made in the main thread, used once.

    A thread hears the signals, because Python's own handlers wait until the main thread is back from what it waits for:
    the device, another rank, the disk. So a second Ctrl-C ends a run that hangs, too.

    Args:
        is_main: whether this process tells the user what it hears.
    """

    def __init__(self, *, is_main: bool) -> None:
        self.noted = 0
        """The largest number of a signal that came while training; 0 where none came."""
        self._is_main = is_main
        self._is_armed = False
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        self._thread.start()
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._take(signal.SIGUSR1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Preempted):
            # The process is about to end with its own code; a launcher's SIGTERM must not come before it.
            return
        self._give_back(*self._before)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)
        self._thread.join()

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Signals are noted from here on; after a ``Preempted`` they stay without effect until the process ends."""
        self._is_armed = True
        self._take(signal.SIGTERM, signal.SIGINT)
        try:
            yield
        except Preempted:
            raise
        except BaseException:
            self._disarm()
            raise
        self._disarm()
        if self.noted:
            # It came after the ranks had agreed for the last time.
            signal.raise_signal(self.noted)

    def _disarm(self) -> None:
        self._is_armed = False
        self._give_back(signal.SIGTERM, signal.SIGINT)

    def _take(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            self._before[number] = signal.signal(number, _heard_by_the_thread)
            signal.siginterrupt(number, False)  # what a library waits for in the kernel is not broken off

    def _give_back(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            before = self._before.pop(number)
            # None: of a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        if self._is_armed and number in STOPPING:
            self.noted = max(self.noted, number)
            if number == signal.SIGINT:
                self._interrupt()
        elif number == signal.SIGUSR1:
            if self._is_main:
                _tell(NOTHING_TO_SAVE)
            leave(Preempted.exit_code)

    def _interrupt(self) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._is_main:
                _tell(SAVING)
        elif now - self._interrupted_at >= SECOND_INTERRUPT_S:
            report_interrupt()
            if sys.stdout.isatty():
                _write(1, SHOW_CURSOR)
            # Nothing that unwinds: it may be what hangs.
            leave(INTERRUPTED_EXIT_CODE)


def _heard_by_the_thread(_number: int, _frame: FrameType | None) -> None:
    """Python writes a signal's number to the thread's pipe only where it has a handler."""


def _tell(text: str) -> None:
    _write(2, text.encode())


def _write(descriptor: int, text: bytes) -> None:
    # Past Python's buffers, whose locks the main thread may hold while it waits. A terminal that is gone stops nothing.
    with suppress(OSError):
        os.write(descriptor, text)
