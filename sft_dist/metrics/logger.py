"""One place where every number of a run comes out: the console, ``metrics.jsonl`` and trackers. Rank 0's only."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sft_dist.config.schema import LoggingConfig
from sft_dist.config.secrets import without_secrets
from sft_dist.errors import CheckpointError, Preempted
from sft_dist.metrics.line_file import LineFile
from sft_dist.metrics.tensorboard_run import TensorboardRun
from sft_dist.metrics.tracker import Act, Feed, Table
from sft_dist.metrics.wandb_run import WandbRun

Metrics = dict[str, int | float]

METRICS = "metrics.jsonl"

# In the line of every evaluation.
ALWAYS = ("step", "eval_loss", "eval_perplexity")

# Without a terminal a bar cannot be redrawn: this many lines are printed over a run instead.
LINES_WITHOUT_TERMINAL = 20

# A redrawing takes 1.5 ms, in which no other thread of rank 0 runs Python.
REDRAWN_PER_S = 2.0


class RunLogger:
    """Writes metrics while a run lasts; use as a context.

    A disk that is full for a while costs no line and ends no run: see ``LineFile``.

    Args:
        folder: the run directory; ``metrics.jsonl`` goes there, one JSON object a line, flushed at once.
        settings: the resolved configuration, for trackers, which get no secret of it.
        completed: steps behind a resumed run; what an earlier process wrote about later ones is removed, because they
            are trained again.
        on_news: called when there is more to be looked at: after each evaluation.

    Raises:
        ConfigError: a tracker was asked for and cannot start. Once it runs, a failure of it is said once and stops
            nothing.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        logging: LoggingConfig,
        settings: dict[str, Any],
        *,
        num_steps: int,
        completed: int = 0,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self.console = Console(highlight=False)
        self._on_news = on_news
        self._num_steps, self._completed = num_steps, completed
        # First, because it may fail: a run that has not written its metrics has not taken the folder.
        self._trackers = _trackers(folder, logging, without_secrets(settings), completed=completed)
        keep_lines(folder / METRICS, completed=completed)
        self._lines, self._writing = LineFile(folder / METRICS), threading.Lock()
        earlier = self._all_lines()
        self._track(lambda tracker: tracker.replay(earlier))
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=REDRAWN_PER_S,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("train", total=self._num_steps, completed=self._completed, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._lines.close()
        if self._lines.waiting:
            self.say(f"[yellow]these lines are not in {self._lines.path} ({self._lines.problem}); append them:")
            for line in self._lines.waiting:
                self.say(escape(line))
        code, is_preempted = 0 if kind is None else 1, isinstance(error, Preempted)
        for tracker in self._trackers:
            tracker.finish(code=code, is_preempted=is_preempted, lines=self._all_lines)
        self._tell_of_trackers()

    def say(self, text: str) -> None:
        """A line above the bar."""
        # What the console writes to may be a file on the full disk, or a terminal that was closed. Nobody can be told
        # then, and a run need not end for it.
        with suppress(OSError):
            # soft_wrap: a narrow terminal wraps a line, a log file keeps it whole.
            self._bar.console.print(text, soft_wrap=True)

    def show(self, figures: RenderableType) -> None:
        """Lines above the bar, as wide as the terminal."""
        with suppress(OSError):
            self._bar.console.print(figures)

    def require_written(self) -> None:
        """At the end of a run, when its lines have nothing left to wait for.

        Raises:
            CheckpointError: some still cannot be written; they are shown when the context ends.
        """
        self._lines.sync()
        if self._lines.problem is not None:
            count = len(self._lines.waiting)
            missing = f"{count} lines are missing" if count else "its last lines may be missing"
            raise CheckpointError(
                f"{self._lines.path} cannot be written ({self._lines.problem}): {missing}",
                fix="make room on the disk and append them, they are shown above; all else is saved",
            )

    def training_step(self, metrics: Metrics, *, bill: str = "") -> None:
        """One line of training metrics; see docs/architecture.md for the keys.

        Args:
            bill: shown beside them; empty where no price is known.
        """
        self._write(metrics)
        assert self._task is not None
        status = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_s']:,.0f} tokens/s" + (f"  {bill}" if bill else "")
        self._bar.update(self._task, completed=metrics["step"], status=status)
        interval = max(1, self._num_steps // LINES_WITHOUT_TERMINAL)
        step = int(metrics["step"])
        if not self.console.is_terminal and (step % interval == 0 or step in (self._completed + 1, self._num_steps)):
            left = (self._num_steps - step) * metrics["step_time_s"]
            self.say(f"step {step}/{self._num_steps}  {status}  lr {metrics['lr']:.2e}  about {left:.0f} s left")

    def evaluation(self, metrics: Metrics) -> None:
        """One line of evaluation metrics."""
        self._write(metrics)
        by_source = {name.removeprefix("eval_loss/"): v for name, v in metrics.items() if name.startswith("eval_loss/")}
        self.say(
            f"eval at step {metrics['step']}: loss {metrics['eval_loss']:.4f}, "
            f"perplexity {metrics['eval_perplexity']:,.2f}"
            + "".join(f"\n  {name}: {loss:.4f}" for name, loss in by_source.items())
        )
        others = {
            name.removeprefix("eval_").removeprefix("scores/"): value
            for name, value in metrics.items()
            if name not in ALWAYS and name.count("/") < 2 and not name.startswith("eval_loss/")
        }
        if others:
            self.say("  " + ", ".join(f"{name} {value:,.4g}" for name, value in others.items()))
        self._on_news()

    def event(self, line: dict[str, Any], text: str) -> None:
        """Something that happened to the run: a line with ``step``, ``event`` and what belongs to it, and one for
        people, which is no markup; empty: none."""
        self._write(line)
        if text:
            self.say(f"[yellow]{escape(text)}")

    def go_back(self, completed: int) -> None:
        """Removes the lines of steps behind the first ``completed``: they are trained again.

        Raises:
            OSError: the file cannot be written.
        """
        with self._writing:
            waiting = [line for line in self._lines.waiting if _step_of(line.encode() + b"\n") <= completed]
            self._lines.waiting.clear()
            self._lines.close()
            keep_lines(self._lines.path, completed=completed, began=True)
            self._lines = LineFile(self._lines.path)
            self._lines.waiting.extend(waiting)
        left = self._all_lines()
        self._track(lambda tracker: tracker.go_back(completed, left))

    def _write(self, metrics: dict[str, Any]) -> None:
        # JSON has no NaN: the value becomes null, and its name is listed so that nobody takes it for missing.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        broken = [k for k, v in finite.items() if v is None]
        had_problem = self._lines.problem is not None
        with self._writing:
            self._lines.write(json.dumps(finite | ({"non_finite": broken} if broken else {})))
        if had_problem and self._lines.problem is None:
            self.say(f"{METRICS} is written again, and has all lines")
        elif not had_problem and self._lines.problem is not None:
            names = " and ".join(tracker.name for tracker in self._trackers)
            also = f"; {names} may lack some, and does not tell" if names else ""
            self.say(
                f"[yellow]{METRICS} cannot be written ({self._lines.problem}): training goes on, its lines wait in "
                f"memory and are written when there is room{also}"
            )
        self._track(lambda tracker: tracker.log(metrics, lines=self._all_lines))

    def table(self, table: Table) -> None:
        """For the trackers."""
        self._track(lambda tracker: tracker.table(table, lines=self._all_lines))

    def conclude(self, results: Mapping[str, Any], artefact: Path) -> None:
        """What the run came to, for the trackers, and where its result is."""
        told = without_secrets(dict(results))
        self._track(lambda tracker: tracker.conclude(told, artefact, lines=self._all_lines))

    def _track(self, act: Act) -> None:
        for tracker in self._trackers:
            tracker.put(act)
        self._tell_of_trackers()

    def _tell_of_trackers(self) -> None:
        for tracker in self._trackers:
            problem = tracker.news()
            if problem is not None:
                self.say(
                    f"[yellow]{tracker.name} takes nothing more ({escape(problem)}); training does without it, "
                    f"{METRICS} has all metrics"
                )

    def _all_lines(self) -> list[str]:
        """Of the whole run, those among them that wait for room on the disk."""
        with self._writing:
            return [*self._lines.path.read_text(encoding="utf-8").splitlines(), *self._lines.waiting]


def _trackers(folder: Path, logging: LoggingConfig, settings: dict[str, Any], *, completed: int) -> list[Feed]:
    trackers: list[Feed] = []
    if logging.wandb.mode != "disabled":
        trackers.append(Feed(WandbRun(logging.wandb, folder, settings)))
    if logging.tensorboard:
        trackers.append(Feed(TensorboardRun(folder, completed=completed)))
    return trackers


def keep_lines(path: Path, *, completed: int, began: bool = False) -> None:
    """Leaves of a ``metrics.jsonl`` what belongs to the first ``completed`` steps, and no line that was cut short.

    Args:
        began: what comes before the first step belongs to them; without it a run of no steps begins anew.

    Raises:
        OSError: it cannot be written.
    """
    if not path.exists():
        return
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    kept = b"".join(line for line in lines if (completed or began) and 0 <= _step_of(line) <= completed)
    if before.startswith(kept):
        os.truncate(path, len(kept))  # needs no room, also on a full disk
        return
    shortened = path.with_name(path.name + ".new")
    try:
        shortened.write_bytes(kept)
        shortened.replace(path)
    except BaseException:
        with suppress(OSError):
            shortened.unlink()
        raise


def _step_of(line: bytes) -> int:
    """-1 for a line that a dying process did not finish."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else -1
    except ValueError:
        return -1
