"""What a rehearsal says: a line an item as it passes, and in the end what the run will take by what was measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.plan.expected import Expected
from sft_dist.plan.units import duration, gib, percent, step_seconds
from sft_dist.run import Run
from sft_dist.train.outlook import Outlook

SECONDS_PER_MINUTE = 60

NAME_COLUMNS, SECONDS_COLUMNS, PEAK_COLUMNS = 20, 8, 11


@dataclass
class Item:
    """One item while it runs.

    Args:
        result: what came out, for people.
        peak_bytes: most memory of any rank: allocated on its GPU, or resident on a CPU.
    """

    name: str
    result: str = ""
    peak_bytes: int = 0


class Report:
    """What rank 0 prints; the others' is quiet."""

    def __init__(self, *, is_main: bool) -> None:
        self.console = Console(highlight=False, quiet=not is_main)
        self._done = "ok" if self.console.options.ascii_only else "✓"

    def begin(self, run: Run, *, completed: int, num_steps: int) -> None:
        ranks = "1 rank" if run.world.size == 1 else f"{run.world.size} ranks"
        where = "from its start" if completed == 0 else f"from step {completed + 1:,}"
        self.console.print(
            f"[bold]rehearsal[/] of a run of {num_steps:,} steps, {where}, under {run.strategy} on {ranks}, before it "
            "starts",
            soft_wrap=True,
        )
        heading = f"    {'':<{NAME_COLUMNS}}{'time':>{SECONDS_COLUMNS}}{'peak':>{PEAK_COLUMNS}}"
        self.console.print(Text(heading, "dim"), soft_wrap=True)

    @contextmanager
    def running(self, name: str) -> Iterator[Item]:
        """Shows that an item runs, and its line when it has passed."""
        item, started = Item(name), time.perf_counter()
        if self.console.is_terminal and not self.console.quiet:
            with self.console.status(f"rehearsing: {name}"):
                yield item
        else:
            yield item
        took, peak = duration(time.perf_counter() - started), gib(item.peak_bytes)
        line = Text.assemble("  ", (self._done, "bold green"), f" {name:<{NAME_COLUMNS}}{took:>{SECONDS_COLUMNS}}")
        line.append(f"{peak:>{PEAK_COLUMNS}}")
        self._print(line, item.result)

    def end(self, run: Run, found: Measured, outlook: Outlook, *, seconds: float) -> None:
        """The projections, beside the plan where there is one."""
        for figures, note in table(projections(run, found, outlook)):
            self._print(figures, note)
        price = outlook.price
        cost = "" if price is None else f", {price.both(price.usd_of(seconds))}"
        self.console.print(
            f"[bold green]rehearsed[/] in {duration(seconds)}{cost}: every item passed, and the state is the one "
            "that the run starts from",
            soft_wrap=True,
        )

    def _print(self, figures: Text, words: str) -> None:
        """Columns of figures with words behind them: broken in their own column by a terminal, whole in a log."""
        if not self.console.is_terminal:
            self.console.print(Text.assemble(figures, "  ", words), soft_wrap=True)
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=figures.cell_len, no_wrap=True)
        grid.add_column()
        grid.add_row(figures, Text(words))
        self.console.print(grid)


@dataclass(frozen=True)
class Measured:
    """What the projections rest on.

    Args:
        step_s: of one step of ``step_tokens`` tokens, alone; beside_s: of the same while a checkpoint was written.
        tokens: of all steps that are to come; steps, evaluations, saves: how many these are.
        evaluation_s: of a whole evaluation, from a part; None where nothing is evaluated.
        saving: of a checkpoint.
        final_s: of ``final/`` and its proof.
        peak_bytes: most that any item took on any rank; None on a CPU, where other things count too.
        answers_s: of all answers of an evaluation, at most; None where nothing is answered. times_answered: how often.
    """

    step_s: float
    step_tokens: int
    beside_s: float
    tokens: float
    steps: int
    evaluations: int
    saves: int
    evaluation_s: float | None
    saving: Saving
    final_s: float
    peak_bytes: int | None
    answers_s: float | None = None
    times_answered: int = 0

    @property
    def steps_s(self) -> float:
        return self.tokens * self.step_s / self.step_tokens

    @property
    def mean_step_s(self) -> float:
        return self.steps_s / self.steps

    def num_saves(self, every_minutes: float | None) -> float:
        """With those that are made by the clock, if that comes before the step."""
        by_clock = 0.0 if every_minutes is None else self.steps_s / (every_minutes * SECONDS_PER_MINUTE)
        return max(float(self.saves), by_clock)

    def saving_s(self, every_minutes: float | None) -> float:
        """Seconds for which saving keeps the whole run waiting."""
        saves = self.num_saves(every_minutes)
        return saves * self.saving.waits_s(self.steps_s / saves)

    def total_s(self, every_minutes: float | None) -> float:
        evaluating_s = self.evaluations * (self.evaluation_s or 0.0)
        answering_s = self.times_answered * (self.answers_s or 0.0)
        return self.steps_s + evaluating_s + answering_s + self.saving_s(every_minutes) + self.final_s


@dataclass(frozen=True)
class Saving:
    """Of one checkpoint.

    Args:
        num_bytes: of all its files.
        blocked_s: until training went on; written_s: until it was written and proven, both from the start.
    """

    num_bytes: int
    blocked_s: float
    written_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.written_s

    def waits_s(self, interval_s: float) -> float:
        """What it costs a run that saves after every ``interval_s`` of steps: a save waits for the one before."""
        return self.blocked_s + max(0.0, self.written_s - self.blocked_s - interval_s)


def due(every: int | None, order_steps: int, *, first: int, last: int) -> int:
    """How many of the moments after steps ``first + 1`` to ``last`` are due: every so many steps, every ``order_steps``
    (of an epoch; 0: not then) and the last."""
    after = np.arange(first + 1, last + 1)
    is_due = after == last
    for period in (every, order_steps):
        if period:
            is_due |= after % period == 0
    return int(is_due.sum())


@dataclass(frozen=True)
class Projection:
    """A figure of the run to come."""

    name: str
    planned: str
    measured: str
    note: str


def projections(run: Run, found: Measured, outlook: Outlook) -> list[Projection]:
    """What the run will take from here on, planned and by what was measured."""
    every_minutes = run.checkpoint.every_minutes
    expected, price, total_s = outlook.expected, outlook.price, found.total_s(every_minutes)
    saves, saving_s = found.num_saves(every_minutes), found.saving_s(every_minutes)
    slower = found.beside_s / found.step_s - 1
    beside = f"a step beside one takes {percent(slower)} longer" if slower > 0 else "no step takes longer beside one"
    took = f"one of {found.step_tokens:,} tokens took {step_seconds(found.step_s)}"
    rows = [
        Projection(
            "a step", _planned(expected, "step_s"), step_seconds(found.mean_step_s),
            f"on average, {found.steps:,} of them; {took}",
        ),
        Projection(
            "saving", "", percent(saving_s / (found.steps_s + saving_s)),
            f"of the loop, {saves:,.0f} checkpoints; {beside}",
        ),
    ]  # fmt: skip
    if found.evaluation_s is not None:
        said = f"estimated from a part of it, {found.evaluations:,} of them"
        rows.insert(1, Projection("an evaluation", "", duration(found.evaluation_s), said))
    if found.answers_s is not None:
        said = f"at most, estimated from the longest, {found.times_answered:,} times"
        rows.insert(2, Projection("its answers", "", duration(found.answers_s), said))
    if found.peak_bytes is not None:
        planned = "" if expected is None else gib(expected.peak_allocated_bytes)
        rows.append(Projection("peak of memory", planned, gib(found.peak_bytes), "of the device that took most"))
    rows.append(Projection("in all", _planned(expected, "total_s"), duration(total_s), "from now on"))
    if price is not None:
        planned_s = None if expected is None else expected.total_s
        planned = "" if planned_s is None else price.both(price.usd_of(planned_s))
        rows.append(Projection("bill", planned, price.both(price.usd_of(total_s)), price.name))
    return rows


def table(rows: list[Projection]) -> list[tuple[Text, str]]:
    """The projections in columns, each with its note; without a column for the plan where nothing is planned."""
    heading = Projection("the run to come", "planned", "measured", "")
    widths = [max(len(getattr(row, key)) for row in [heading, *rows]) for key in ("planned", "measured")]
    has_plan = any(row.planned for row in rows)
    lines = []
    for row in [heading, *rows]:
        planned = f"{row.planned:>{widths[0]}}  " if has_plan else ""
        text = f"    {row.name:<{NAME_COLUMNS}}{planned}{row.measured:>{widths[1]}}"
        lines.append((Text(text, "dim" if row is heading else ""), row.note))
    return lines


def _planned(expected: Expected | None, key: str) -> str:
    value = None if expected is None else getattr(expected, key)
    text = step_seconds if key == "step_s" else duration
    return "" if value is None else text(value)
