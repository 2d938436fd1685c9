"""Programs that follow a run elsewhere, such as W&B: each is fed beside the training, and none can hold it up.

A tracker may be slow, break, or hang for good. So what it is to do waits in a queue and is done by a thread of its own;
the step only appends to the queue. ``metrics.jsonl`` is written first and has everything.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Lines = Callable[[], list[str]]

# What waits for a tracker, at most. At ten steps a second it then has been silent for a quarter of an hour.
MOST_WAITING = 10_000

# Of a run that was told to stop, whose job has seconds (docs/cluster.md: srun waits 40 s for the last process).
PREEMPTED_S = 20.0


@dataclass(frozen=True)
class Table:
    """Texts and numbers, as they are at a step.

    Args:
        rows: reads them, when they are shown: a tracker that repeats a table need not hold it.
        is_known: an earlier start of the run, or what is left of this one, has shown it already.
    """

    name: str
    columns: Sequence[str]
    rows: Callable[[], Sequence[Sequence[Any]]]
    step: int
    is_known: bool = False


class Tracker(Protocol):
    """Takes what a run measures; any of its calls may raise, and is then the last one.

    Attributes:
        name: for people.
        patience_s: that the end of a run waits for it, at most.
    """

    name: str
    patience_s: float

    def log(self, metrics: Mapping[str, Any], *, lines: Lines) -> None:
        """The metrics of a step or of an evaluation, by name, ``step`` among them.

        Args:
            lines: all lines of ``metrics.jsonl`` so far, these metrics among them.
        """

    def replay(self, lines: list[str]) -> None:
        """What earlier starts of the run have measured."""

    def go_back(self, completed: int, lines: list[str]) -> None:
        """The run is at an earlier step again, and trains those behind it once more.

        Args:
            completed: steps that stay.
            lines: of them.
        """

    def table(self, table: Table, *, lines: Lines) -> None:
        """A table, in place of an earlier one of its name."""

    def conclude(self, results: Mapping[str, Any], artefact: Path, *, lines: Lines) -> None:
        """What the run came to, and where its result is."""

    def finish(self, *, code: int, is_preempted: bool, lines: Lines) -> None:
        """Writes what is not written yet."""

    def give_up(self) -> None:
        """Ends what would hold up the end of this process, after ``finish`` did not come back."""


Act = Callable[[Tracker], None]


class Feed:
    """One tracker, fed from a queue by a thread."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._acts: queue.SimpleQueue[Act | None] = queue.SimpleQueue()
        self._problem: str | None = None
        self._is_told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"feed of {tracker.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self._tracker.name

    def put(self, act: Act) -> None:
        """Has something done, after all before it; nothing more where the tracker is lost."""
        if self._problem is not None:
            return
        if self._acts.qsize() >= MOST_WAITING:
            self._lose(f"it does not answer, and {MOST_WAITING:,} lines wait for it")
            return
        self._acts.put(act)

    def news(self) -> str | None:
        """Why it takes nothing more, told once."""
        if self._problem is None or self._is_told:
            return None
        self._is_told = True
        return self._problem

    def finish(self, *, code: int, is_preempted: bool, lines: Lines) -> None:
        """Lets it do what waits, and end; waits for that as long as the tracker is to be waited for."""
        self.put(lambda tracker: tracker.finish(code=code, is_preempted=is_preempted, lines=lines))
        if self._problem is None:
            self._acts.put(None)
            patience_s = min(self._tracker.patience_s, PREEMPTED_S) if is_preempted else self._tracker.patience_s
            if not self._ended.wait(patience_s):
                self._lose(f"it has not ended within {patience_s:.0f} s")
        if not self._ended.is_set():
            self._tracker.give_up()

    def _work(self) -> None:
        while self._problem is None and (act := self._acts.get()) is not None:
            try:
                act(self._tracker)
            except (Exception, SystemExit) as error:
                self._lose((str(error).strip().splitlines() or [type(error).__name__])[0])
        self._ended.set()

    def _lose(self, problem: str) -> None:
        """For the first reason; what follows is of its making."""
        self._problem = self._problem or problem
