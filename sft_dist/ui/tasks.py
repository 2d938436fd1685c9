"""Commands that pages start: each a process group of its own, shown as it prints, ended when asked and at the end.

A command that imports torch, or takes long, would hold up the pages and could not be cancelled in their process.
"""

from __future__ import annotations

import codecs
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import Literal

MAX_RUNNING, MAX_KEPT = 2, 30

# Between the request to end and the end by force.
GRACE_S = 5.0

# Of what a command prints; more is read and not kept.
MAX_CHARACTERS = 1_000_000

# What the command writes of its result.
HTML, JSON = "result.html", "result.json"

State = Literal["running", "cancelled", "ended"]


class Busy(Exception):
    """As many commands run as may."""


class Task:
    """One command.

    Args:
        kind: which page it belongs to; again: the address of that page as it was filled in.
        command: whole, as it is run in ``cwd``. folder: that its result goes to.
    """

    def __init__(self, number: int, kind: str, title: str, command: Sequence[str], *, folder: Path, again: str) -> None:
        self.number, self.kind, self.title, self.again = number, kind, title, again
        self.command, self.folder, self.cwd = tuple(command), folder, Path.cwd()
        self.state: State = "running"
        self.exit_code: int | None = None
        self.began, self._took_s = time.monotonic(), 0.0
        self._text, self._changed = "", Condition(Lock())
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, env=_environment(), cwd=self.cwd,
        )  # fmt: skip
        Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def took_s(self) -> float:
        return time.monotonic() - self.began if self.exit_code is None else self._took_s

    @property
    def text(self) -> str:
        """What it has printed so far."""
        with self._changed:
            return self._text

    @property
    def error(self) -> str:
        """Of a command that failed: what is wrong and how to fix it, in its own words."""
        if self.exit_code in (None, 0):
            return ""
        lines = self.text.rstrip().splitlines()
        begins = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        return "\n".join(lines[begins[-1] :]) if begins else ""

    def file(self, name: str) -> Path | None:
        """A part of the result; None: it has not been written."""
        path = self.folder / name
        return path if self.exit_code is not None and path.is_file() else None

    def cancel(self) -> None:
        """Asks its processes to end, and ends those that have not after a while."""
        with self._changed:
            if self.exit_code is not None:
                return
            self.state = "cancelled"
            self._signal(signal.SIGTERM)
        Thread(target=self._force, daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self.exit_code is not None, timeout_s)

    def _force(self) -> None:
        if not self.wait(GRACE_S):
            with self._changed:
                if self.exit_code is None:
                    self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """To its group, whose id nobody else can have before the process was waited for."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while block := os.read(self._process.stdout.fileno(), 1 << 16):
            text = decoder.decode(block).replace("\r\n", "\n").replace("\r", "\n")
            with self._changed:
                self._text += text[: max(0, MAX_CHARACTERS - len(self._text))]
        # What it has left behind ends with it: until it is waited for, its group is its own.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._changed:
            self._signal(signal.SIGKILL)
            code = self._process.wait()
            self._took_s = time.monotonic() - self.began
            self.exit_code = 128 - code if code < 0 else code
            self.state = "ended" if self.state == "running" else self.state
            self._changed.notify_all()
        self._process.stdout.close()


def _environment() -> dict[str, str]:
    """As a terminal without colours, wide enough for a table, that shows each line at once."""
    plain = {"PYTHONUNBUFFERED": "1", "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
    return {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | plain


class Tasks:
    """All commands of this start. ``close`` ends those that run, and deletes the results."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sft-dist-ui-"))
        self._tasks: dict[int, Task] = {}
        self._number, self._lock, self._is_closed = 0, Lock(), False

    def start(self, kind: str, title: str, arguments: Callable[[Path], Sequence[str]], *, again: str) -> Task:
        """
        Args:
            arguments: of ``sft-dist``, given the folder for its result.

        Raises:
            Busy: there is no room for another.
        """
        with self._lock:
            if self._is_closed or len(self.running()) >= MAX_RUNNING:
                raise Busy
            self._number += 1
            folder = self._folder / str(self._number)
            folder.mkdir()
            command = [sys.executable, "-m", "sft_dist", *arguments(folder)]
            task = Task(self._number, kind, title, command, folder=folder, again=again)
            self._tasks[task.number] = task
            ended = [each for each in self._tasks.values() if each.exit_code is not None]
            for old in ended[: max(0, len(self._tasks) - MAX_KEPT)]:
                del self._tasks[old.number]
                shutil.rmtree(old.folder, ignore_errors=True)
            return task

    def find(self, number: str) -> Task | None:
        return self._tasks.get(int(number)) if number.isdecimal() else None

    def running(self) -> list[Task]:
        return [task for task in list(self._tasks.values()) if task.exit_code is None]

    def of_kinds(self, *kinds: str) -> list[Task]:
        """The newest first."""
        return [task for task in reversed(list(self._tasks.values())) if task.kind in kinds]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        running = self.running()
        for task in running:
            task.cancel()
        for task in running:
            task.wait(GRACE_S + 5)
        shutil.rmtree(self._folder, ignore_errors=True)
