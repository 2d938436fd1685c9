"""The watchdog of a rank: two threads, one that says what this rank is doing, one that sees that nothing moves.

Both run while the main thread is in a collective, a system call or a kernel. What needs the disk when it is time to
leave is done beside the thread that leaves, which does not wait for a disk that hangs.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self, TypeVar

import psutil

from sft_dist.config.watchdog_schema import WatchdogConfig
from sft_dist.errors import Preempted, Stalled
from sft_dist.metrics.heartbeat import Heartbeat, tell_end
from sft_dist.runtime import progress, rank_log
from sft_dist.runtime.exit_notes import leave
from sft_dist.runtime.failure import note, report
from sft_dist.runtime.world import World
from sft_dist.watchdog import evidence, record, verdict
from sft_dist.watchdog.judge import Guilty, judge
from sft_dist.watchdog.limits import Limits
from sft_dist.watchdog.record import Record
from sft_dist.watchdog.verdict import Verdict

T = TypeVar("T")

POLL_S, BEAT_S = 0.5, 3.0

# Time that passes between two looks counts up to this: a process that was suspended has not hung.
MOST_OF_A_POLL_S = 2.0

# A rank that has said nothing new for so long does not run, and for half of the limit that the reader is under.
SILENT_S = 4 * BEAT_S

# The timer that writes stacks reads them without the interpreter's lock, and may stick for ever in one that changes: it
# is to fire only where nothing has set it anew for some beats, but before the others call this rank silent.
LEAST_TIMER_S = 3 * BEAT_S

# Ranks begin to judge one after the other, so that a thousand do not read the files of a thousand.
TURN_S, TURNS = 2.0, 5

# For the others' stacks, so that no launcher ends them meanwhile; for a disk that may be what hangs.
SETTLE_S, PATIENCE_S = 5.0, 10.0

START = "watchdog/start"


class Store(Protocol):
    """What is used of torch's."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...


class AwakeClock:
    """Seconds in which this process ran, by looks that follow each other; it is not that of any machine.

    Neither a laptop that sleeps nor a job that SLURM suspends makes it go on, whatever the kernel's clocks do.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last, self._awake_s = now, now(), 0.0

    def look(self) -> float:
        now = self._now()
        self._awake_s += min(now - self._last, MOST_OF_A_POLL_S)
        self._last = now
        return self._awake_s


class Watchdog:
    """Use as a context around a run. Ends this process, not only the run: nothing that unwinds would come back.

    Args:
        output_dir: of the run.
        heartbeat: knows the phase and the step; is told of the end.
    """

    def __init__(self, config: WatchdogConfig, output_dir: Path, world: World, heartbeat: Heartbeat) -> None:
        self.limits = Limits(config)
        self._is_enabled, self._output_dir, self._world, self._heartbeat = config.enabled, output_dir, world, heartbeat
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._born = psutil.Process().create_time()
        self._start = _name_of_a_start()
        self._clock, self._ends, self._changed = AwakeClock(), threading.Event(), threading.Event()
        self._beats: Path | None = None
        self._number = 0
        self._still_s, self._since = 0.0, datetime.now(UTC)
        self._unchanged: dict[int, tuple[int, float]] = {}  # by rank: a beat, and when it was first seen
        self._stacks: IO[bytes] | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._is_enabled:
            self._run(self._watch, "watchdog")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._changed.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
        if self._beats is not None:
            with suppress(OSError):
                if error is None or isinstance(error, Preempted):
                    record.forget(self._beats, self._world.rank)
                else:  # the others may wait for this rank, and be told that it is no more
                    record.write(self._beats, self._record("ended"))

    def meet(self, store: Store) -> None:
        """From here on the ranks see each other; every rank of several calls it when they have met."""
        if not self._is_enabled or self._world.size == 1:
            return
        if self._world.is_main:
            store.set(START, self._start)
        self._start = store.get(START).decode()
        self._beats = self._output_dir / record.FOLDER / self._start
        self._run(self._beat, "watchdog beats")

    def forget_earlier(self) -> None:
        """What processes that could not clean up have left; for rank 0, when the run directory is its own."""
        starts = self._output_dir / record.FOLDER
        for folder in starts.glob("*"):
            if folder != self._beats:
                shutil.rmtree(folder, ignore_errors=True)
        if self._beats is None:
            with suppress(OSError):
                starts.rmdir()

    def _run(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _beat(self) -> None:
        """A write that hangs or fails stops nothing: the others see that nothing new comes."""
        assert self._beats is not None
        while not self._ends.is_set():
            with suppress(OSError):
                record.write(self._beats, self._record(self._heartbeat.doing))
                self._stacks_when_held(self._beats)
            self._changed.wait(BEAT_S)
            self._changed.clear()

    def _stacks_when_held(self, folder: Path) -> None:
        """Where something holds the interpreter, no thread of Python runs: a timer in C writes the stacks then."""
        limit_s = self._limit_s()
        if limit_s is None:
            faulthandler.cancel_dump_traceback_later()
            return
        if self._stacks is None:
            self._stacks = record.stacks_file(folder, self._world.rank).open("wb")
        faulthandler.dump_traceback_later(max(limit_s, LEAST_TIMER_S), file=self._stacks)

    def _record(self, phase: str) -> Record:
        self._number += 1
        key = self.limits.key(self._heartbeat.doing, progress.own.part)
        return Record(
            rank=self._world.rank, beat=self._number, host=self._host, pid=self._pid, born=self._born, phase=phase,
            part=progress.own.part, key=key or "", step=self._heartbeat.step, still_s=self._still_s,
            since=self._since.isoformat(timespec="milliseconds"), limit_s=self._limit_s(),
            collectives=evidence.collectives(),
        )  # fmt: skip

    def _limit_s(self) -> float | None:
        return self.limits.of(self._heartbeat.doing, progress.own.part)

    def _watch(self) -> None:
        pieces, moved, step, stepped = progress.own.pieces, 0.0, self._heartbeat.step, 0.0
        looked, limit_s = 0.0, self._limit_s()
        while not self._ends.wait(POLL_S):
            now = self._clock.look()
            if progress.own.pieces != pieces:
                pieces, moved, self._since = progress.own.pieces, now, datetime.now(UTC)
                self._unchanged.clear()
            if self._heartbeat.step != step:
                if step is not None and self._heartbeat.step is not None and self._heartbeat.step > step and stepped:
                    self.limits.stepped((now - stepped) / (self._heartbeat.step - step))
                step, stepped = self._heartbeat.step, now
            self._still_s = now - moved
            if self._limit_s() != limit_s:  # of another phase: the timer in C is to know
                limit_s = self._limit_s()
                self._changed.set()
            if self._still_s >= BEAT_S and now - looked >= self._pause_s():
                looked = now
                self._look(now)

    def _pause_s(self) -> float:
        return min(BEAT_S, 1.0) if self._world.size == 1 else max(BEAT_S, self._world.size / 100)

    def _look(self, now: float) -> None:
        """Whether this stillness is a stall; does not return if it is."""
        limit_s = self._limit_s()
        if self._beats is None:  # alone, or not met yet
            if limit_s is not None and self._still_s >= limit_s:
                own = self._record(self._heartbeat.doing)
                self._end(verdict.verdict_of(Guilty(()), [own] if self._world.size == 1 else [None] * own.rank + [own]))
            return
        folder = self._stall_folder()
        answered, found = _within(PATIENCE_S, lambda: verdict.read(folder))
        if found is not None:
            self._leave(found, is_first=False)
        if not answered:
            self._disk_hangs(limit_s)
            return
        turn_s = TURN_S * min(self._world.rank, TURNS)
        if limit_s is None or self._still_s < limit_s / 2 + turn_s:
            return
        self._changed.set()  # the others are to see where this one is
        beats = self._beats
        answered, records = _within(PATIENCE_S, lambda: record.read_all(beats, self._world.size))
        if not answered or records is None:
            self._disk_hangs(limit_s)
            return
        guilty = judge(
            records, self._unchanged_s(records, now), beat_s=BEAT_S, silent_s=max(SILENT_S, limit_s / 2)
        )  # fmt: skip
        if guilty is not None and self._still_s >= limit_s:
            self._end(verdict.verdict_of(guilty, records, state=self._state_of(guilty, records)))

    def _unchanged_s(self, records: list[Record | None], now: float) -> list[float]:
        for rank, each in enumerate(records):
            beat = 0 if each is None else each.beat
            if rank not in self._unchanged or self._unchanged[rank][0] != beat:
                self._unchanged[rank] = (beat, now)
        return [now - self._unchanged[rank][1] for rank in range(len(records))]

    def _disk_hangs(self, limit_s: float | None) -> None:
        """Nothing can be read of the others, nor be left for anybody."""
        if limit_s is not None and self._still_s >= limit_s:
            own = self._record(self._heartbeat.doing)
            _tell(f"rank {own.rank} on {own.host}: no progress for {self._still_s:.0f} s, and {self._output_dir} does "
                  "not answer\n")  # fmt: skip
            _exit_with_note()

    def _stall_folder(self) -> Path:
        return self._output_dir / verdict.FOLDER / self._start

    def _state_of(self, guilty: Guilty, records: list[Record | None]) -> str | None:
        first = records[guilty.ranks[0]] if guilty.ranks else None
        return evidence.state_of(first.pid) if guilty.is_silent and first is not None and self._is_here(first) else None

    def _is_here(self, other: Record) -> bool:
        """Whether its process is one of this machine, and still there."""
        if other.host != self._host or other.pid == self._pid:
            return False
        with suppress(psutil.Error):
            return bool(psutil.Process(other.pid).create_time() == other.born)
        return False

    def _end(self, found: Verdict) -> None:
        folder = self._stall_folder()
        _, is_first = _within(PATIENCE_S, lambda: verdict.write_first(folder, found))
        self._leave(found, is_first=is_first is not False)

    def _leave(self, found: Verdict, *, is_first: bool) -> None:
        """Does not return. What is written may take ``PATIENCE_S``, and then this process is no more."""
        error = Stalled(
            found.what, fix=f"go on with --resume auto; the stacks of all ranks are in {self._stall_folder()}"
        )

        def leave_in_order() -> None:
            with suppress(OSError):
                self._keep_evidence(found)
            if self._world.is_main:
                self._heartbeat.__exit__(Stalled, error, None)
            elif is_first and 0 in found.ranks:
                with suppress(OSError, ValueError):
                    tell_end(self._output_dir, error)
            if is_first:
                report(error, debug=False)
            self._wait_for_the_others(found)
            self._end_the_silent(found)
            if self._world.is_main:
                rank_log.finish()

        _within(PATIENCE_S + SETTLE_S, leave_in_order)
        _exit_with_note()

    def _keep_evidence(self, found: Verdict) -> None:
        folder, rank = self._stall_folder(), self._world.rank
        folder.mkdir(parents=True, exist_ok=True)
        now, since = (each.isoformat(timespec="seconds") for each in (datetime.now(UTC), self._since))
        where = self._record(self._heartbeat.doing).where
        heading = f"rank {rank} on {self._host}, process {self._pid}, at {now}: {where}, since {since}"
        evidence.dump_stacks(folder / f"rank-{rank}.txt", heading)
        with suppress(OSError, RuntimeError):
            evidence.dump_flight_recorder(folder / f"rank-{rank}.nccl")
        for other in self._silent_here(found):
            lines = [f"rank {other.rank} on {other.host}, process {other.pid}, which does not run", ""]
            lines += ["threads in the kernel: id, state, name, what it waits in", *evidence.kernel_threads(other.pid)]
            assert self._beats is not None
            with suppress(OSError):
                lines += ["", record.stacks_file(self._beats, other.rank).read_text(errors="replace")]
            (folder / f"rank-{other.rank}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _silent_here(self, found: Verdict) -> list[Record]:
        places = [found.places[rank] for rank in found.ranks] if found.is_silent else []
        others = [Record(**place) for place in places if place is not None]
        return [other for other in others if self._is_here(other)]

    def _wait_for_the_others(self, found: Verdict) -> None:
        """A launcher ends all when one has ended."""
        silent = found.ranks if found.is_silent else ()
        expected = [rank for rank in range(self._world.size) if rank not in silent]
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            if all((self._stall_folder() / f"rank-{rank}.txt").exists() for rank in expected):
                return
            time.sleep(0.1)

    def _end_the_silent(self, found: Verdict) -> None:
        """On this machine: such a process cannot leave, and not every launcher ends it."""
        for other in self._silent_here(found):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(other.pid, signal.SIGKILL)


def _name_of_a_start() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:4]}"


def _within(seconds: float, work: Callable[[], T]) -> tuple[bool, T | None]:
    """Whether it came to an end in time, and what came of it; None after an error of the disk."""
    found: list[T] = []

    def run() -> None:
        with suppress(OSError, ValueError):
            found.append(work())

    thread = threading.Thread(target=run, name="watchdog disk", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive(), found[0] if found else None


def _exit_with_note() -> None:
    def note_and_leave() -> None:
        note(Stalled.exit_code)
        leave(Stalled.exit_code)

    _within(PATIENCE_S, note_and_leave)
    os._exit(Stalled.exit_code)


def _tell(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())
