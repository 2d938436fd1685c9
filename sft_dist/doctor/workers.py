"""The doctor's side of its workers: starts them, hears them, and ends them whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

MODULE = "sft_dist.doctor.worker"

# Of what it wrote last, that a failure is told with.
STDERR_LINES = 20


class Worker:
    """A process that imports torch and measures; see ``worker.py``."""

    def __init__(self) -> None:
        # One thread: several workers share a node. The C++ side of torch tells of every peer that goes.
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_without_launcher(os.environ) | quiet,
        )
        self.said: dict[str, dict[str, Any]] = {}
        self._tail: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_events, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def wait_for(self, event: str, deadline: float) -> dict[str, Any] | None:
        """What it said with that event; None where it ended without, or did not by then (``time.monotonic``)."""
        with self._changed:
            self._changed.wait_for(
                lambda: event in self.said or self._ended, timeout=max(0.0, deadline - time.monotonic())
            )
            return self.said.get(event)

    def order(self, orders: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(orders) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has ended: ``failure`` says why
            return

    def failure(self) -> str:
        """Why it has not done what it was to do, in a line."""
        if not self._ended:
            return "it does not answer"
        code = self._process.wait()
        for reader in self._readers:
            reader.join(timeout=1)
        last = next((line.strip() for line in reversed(self._tail) if line.strip()), "")
        return f"{last or 'without a word'} (exit code {code})"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=1)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print there, too
                facts = json.loads(line)
                with self._changed:
                    self.said[facts.pop("event")] = facts
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._tail = [*self._tail, line][-STDERR_LINES:]


class Workers:
    """Those of a node. A context: they end with it."""

    def __init__(self, count: int) -> None:
        self.all = [Worker() for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.all:
            worker.end()

    def grow(self, count: int) -> None:
        """Starts more of them, up to so many."""
        self.all += [Worker() for _ in range(count - len(self.all))]

    def ready(self, deadline: float) -> list[dict[str, Any] | None]:
        return [worker.wait_for("ready", deadline) for worker in self.all]

    def measured(self, deadline: float) -> list[dict[str, dict[str, Any]]]:
        """What each of them said until it was done, or until then."""
        for worker in self.all:
            worker.wait_for("done", deadline)
        return [dict(worker.said) for worker in self.all]


def _without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of a launcher that torch would follow."""
    names: Sequence[str] = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in env.items() if name not in names and not name.startswith("TORCHELASTIC_")}
