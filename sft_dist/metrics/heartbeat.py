"""``heartbeat.json``: what a run is doing at the moment, for those who look at its folder from elsewhere.

A thread of rank 0 writes it, so it also beats while something takes long. A process that was killed writes no more: the
age of the file tells. One that beats and makes no step is told by ``step_at``, a time of its own. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pydantic import TypeAdapter, ValidationError

from sft_dist.errors import Preempted, SftError
from sft_dist.runtime import progress
from sft_dist.runtime.failure import INTERRUPTED_EXIT_CODE
from sft_dist.runtime.slurm_step import own_job_id
from sft_dist.runtime.world import restarts

HEARTBEAT = "heartbeat.json"

BEAT_S = 5.0

# Between two writes, however fast one phase follows another.
LEAST_S = 0.5

# For a write that hangs when the process is to end.
PATIENCE_S = 10.0

MAX_TEXT = 500

Doing = Literal["preparing", "loading", "rehearsing", "training", "evaluating", "saving", "exporting", "proving"]
Ended = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class Beat:
    """The file. Times are ISO 8601 in UTC by the clock of ``host``; None: not yet, or not known.

    Args:
        phase: what rank 0 is doing, or how it ended: stopped is by a signal, with a checkpoint.
        phase_since: when that began.
        during: the phase that it was in when it stopped or failed.
        what: one line about the end.
        exit_code: that the process ends with, if all goes well from here on.
        step, num_steps: completed, and of the whole run.
        step_at: when this process completed its last step.
        step_s: mean wall time from one completed step to the next in this process, with all that comes between.
        written_at: when this was written; started: when the process was.
        job_id, restart: of SLURM; restart counts from 0.
        launch_restarts: how often the launcher has started the processes again.
    """

    phase: Doing | Ended
    phase_since: str
    started: str
    written_at: str
    host: str
    pid: int
    strategy: str
    world_size: int
    job_id: str | None = None
    restart: int = 0
    launch_restarts: int = 0
    step: int | None = None
    num_steps: int | None = None
    step_at: str | None = None
    step_s: float | None = None
    during: Doing | None = None
    what: str | None = None
    exit_code: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Beat | None:
        """That of a run directory; None where there is none.

        Raises:
            ValueError: the file is none of this program's.
            OSError: it cannot be read.
        """
        try:
            text = (folder / HEARTBEAT).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _BEAT.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None


_BEAT = TypeAdapter(Beat)


class Heartbeat:
    """What this process is doing; use as a context around all of it.

    Every rank has one. It is written from ``begin`` on, which is rank 0's to call; the others keep theirs to
    themselves. A write that fails stops nothing.
    """

    def __init__(self) -> None:
        self._phase: Doing = "loading"
        self._started = self._since = _now()
        self._step: int | None = None
        self._num_steps: int | None = None
        self._step_at: str | None = None
        self._first: tuple[int, float] | None = None  # a completed step, and when, in seconds of a steady clock
        self._step_s: float | None = None
        self._beat: Beat | None = None
        self._changed, self._ends = threading.Event(), threading.Event()

    def begin(self, folder: Path, *, strategy: str, world_size: int, say: Callable[[str], None]) -> None:
        """Writes into a run directory from now on, which this process has taken.

        Args:
            say: told once if the file cannot be written.
        """
        self._path, self._say, self._has_told = folder / HEARTBEAT, say, False
        self._beat = Beat(
            phase=self._phase,
            phase_since=self._since,
            started=self._started,
            written_at=_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            strategy=strategy,
            world_size=world_size,
            job_id=own_job_id(),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            launch_restarts=restarts(),
        )
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def doing(self) -> Doing:
        """The phase that this process is in."""
        return self._phase

    @property
    def step(self) -> int | None:
        """Completed; None before it is known."""
        return self._step

    @contextmanager
    def phase(self, name: Doing) -> Iterator[None]:
        """Until the block ends, then the phase that was before. What a rehearsal does is the rehearsal."""
        before = self._phase
        if before == "rehearsing":
            yield
            return
        self._enter(name)
        yield
        self._enter(before)  # not after a failure, which is told with the phase that it was in

    def at(self, step: int, num_steps: int) -> None:
        """Where the run stands before this process trains."""
        self._step, self._num_steps = step, num_steps

    def completed(self, step: int) -> None:
        """A step has been trained, and its numbers are here."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        elif step > self._first[0]:
            self._step_s = (now - self._first[1]) / (step - self._first[0])
        self._step, self._step_at = step, _now()
        progress.tick()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beat is None:
            return
        self._ends.set()
        self._changed.set()
        self._thread.join(PATIENCE_S)
        if not self._thread.is_alive():
            self._write(_ending(self._now_doing(self._beat), self._phase, error))

    def _enter(self, name: Doing) -> None:
        self._phase, self._since = name, _now()
        progress.tick()
        self._changed.set()

    def _keep_beating(self) -> None:
        assert self._beat is not None
        while not self._ends.is_set():
            self._write(self._now_doing(self._beat))
            self._ends.wait(LEAST_S)
            self._changed.wait(BEAT_S - LEAST_S)
            self._changed.clear()

    def _now_doing(self, beat: Beat) -> Beat:
        return replace(
            beat, phase=self._phase, phase_since=self._since, written_at=_now(), step=self._step,
            num_steps=self._num_steps, step_at=self._step_at, step_s=self._step_s,
        )  # fmt: skip

    def _write(self, beat: Beat) -> None:
        unfinished = self._path.with_name(HEARTBEAT + ".new")
        try:
            unfinished.write_text(json.dumps(asdict(beat), ensure_ascii=False) + "\n", encoding="utf-8")
            unfinished.replace(self._path)
        except OSError as error:
            with suppress(OSError):  # room for the others
                unfinished.unlink()
            with suppress(OSError):  # a full disk still takes the time of a file: this process lives
                os.utime(self._path)
            if not self._has_told:
                self._has_told = True
                self._say(f"{self._path} cannot be written ({error.strerror or error}): `sft-dist status` sees less")


def tell_end(folder: Path, error: SftError) -> None:
    """Writes the end of a run into its folder, for a rank 0 that does not run any more.

    Raises:
        OSError, ValueError: the file cannot be written, or is none of this program's.
    """
    beat = Beat.read(folder)
    if beat is not None and beat.phase != "done" and beat.phase != "stopped" and beat.phase != "failed":
        ending = _ending(replace(beat, written_at=_now()), beat.phase, error)
        unfinished = folder / (HEARTBEAT + ".end")
        unfinished.write_text(json.dumps(asdict(ending), ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(folder / HEARTBEAT)


def _ending(beat: Beat, during: Doing, error: BaseException | None) -> Beat:
    """The last state of a process that ends in order.

    Args:
        during: the phase that it was in.
    """
    if error is None:
        return replace(beat, phase="done", phase_since=beat.written_at, exit_code=0)
    phase: Ended = "stopped" if isinstance(error, Preempted | KeyboardInterrupt) else "failed"
    code = 1
    if isinstance(error, SftError):
        what, code = error.what, error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        what, code = "interrupted", INTERRUPTED_EXIT_CODE
    else:
        what = f"{type(error).__name__}: {error}"
    line = (what.splitlines() or [""])[0][:MAX_TEXT]
    return replace(beat, phase=phase, phase_since=beat.written_at, during=during, what=line, exit_code=code)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
