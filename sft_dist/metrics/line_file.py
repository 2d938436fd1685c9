"""A file that grows by whole lines, and loses none when its disk is full for a while."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path


class LineFile:
    """Appends lines to a file that no other process writes; each is in the file when ``write`` returns, or waits.

    A file system that refuses a write, because it is full or fails, may have taken a part of it. That part is cut off
    again; the line waits in memory, and those after it too, so that they come into the file in order.

    Args:
        path: made if it is not there; a last line that was cut short is removed.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: deque[str] = deque()
        self.problem: str | None = None  # why lines wait
        self._descriptor: int | None = _open(path)
        self._end = _end_of_last_line(path)  # bytes that are whole lines
        os.ftruncate(self._descriptor, self._end)

    def write(self, line: str) -> None:
        """Appends a line, given without its end, after those that wait."""
        self.waiting.append(line)
        self.flush()

    def flush(self) -> None:
        """Tries again what waits; ``problem`` is None when nothing does any longer."""
        try:
            while self.waiting:
                self._append(self.waiting[0].encode() + b"\n")
                self.waiting.popleft()
        except OSError as error:
            self.problem = error.strerror or str(error)
            self._give_up()
        else:
            self.problem = None

    def sync(self) -> None:
        """Puts on the disk what is in the file; a file system may refuse as late as now. ``problem`` says so."""
        self.flush()
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self.problem = error.strerror or str(error)

    def close(self) -> None:
        """Ends the writing. Lines that wait are the caller's to tell of."""
        self.sync()
        if self._descriptor is not None:
            with suppress(OSError):  # after sync, nothing can be lost
                os.close(self._descriptor)
            self._descriptor = None

    def _append(self, data: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = _open(self.path)
            self._end = min(self._end, os.fstat(self._descriptor).st_size)
            os.ftruncate(self._descriptor, self._end)
        written = 0
        while written < len(data):
            written += os.write(self._descriptor, data[written:])
        self._end += len(data)

    def _give_up(self) -> None:
        """Until the next line. The file is opened anew then: on a network it may not be the same one any more."""
        if self._descriptor is None:
            return
        # If this fails too, it is done before the next line is written, or when the file is next opened for a run.
        with suppress(OSError):
            os.ftruncate(self._descriptor, self._end)
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = None


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def _end_of_last_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1
