"""A program in a terminal of its own (a pty), to type to and to read from."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|[\x01\x02]")


class Terminal:
    """Runs a command in a terminal of ``columns`` by ``rows`` cells until the block ends; then the process is gone.

    Attributes:
        raw: all that it has shown.
    """

    def __init__(self, command: Sequence[str], *, columns: int = 80, rows: int = 24) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        del environment["COLUMNS"], environment["LINES"]
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.raw = ""
        self._bytes = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._ours)

    @property
    def text(self) -> str:
        """What it has shown, without colours and movements of the cursor."""
        return ESCAPES.sub("", self.raw).replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, *, after: int = 0, seconds: float = 180) -> int:
        """Reads until ``pattern`` has come behind character ``after`` of ``text``; returns where it ends."""
        until = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.text, after)) is None:
            assert self._read(until), f"{pattern!r} did not come in:\n{self.text}"
        return found.end()

    def wait_for_exit(self, *, seconds: float = 120) -> int:
        """The exit code."""
        until = time.monotonic() + seconds
        while self._read(until):
            pass
        return self._process.wait(timeout=max(until - time.monotonic(), 1))

    def _read(self, until: float) -> bool:
        """False: it has ended, or the time has."""
        if not select.select([self._ours], [], [], max(until - time.monotonic(), 0))[0]:
            return False
        try:
            part = os.read(self._ours, 1 << 16)
        except OSError:  # Linux says so of a terminal that nobody has open any more
            return False
        self._bytes += part
        self.raw = self._bytes.decode(errors="ignore")
        return bool(part)
