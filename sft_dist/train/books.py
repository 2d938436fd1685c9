"""Everything that a session writes about plan and bill beside its metrics: opened, begun and closed by ``train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape

from sft_dist.data.prepared import PreparedData
from sft_dist.metrics.logger import RunLogger
from sft_dist.plan.expected import Expected
from sft_dist.plan.money import format_usd
from sft_dist.plan.units import duration, gib, step_seconds
from sft_dist.run import Run
from sft_dist.train.account import Account
from sft_dist.train.final_state import FinalState
from sft_dist.train.outlook import NO_GPU, Outlook
from sft_dist.train.receipt import Actual, feed_calibration, measured, measures, planned, ratios, write_receipt
from sft_dist.train.sessions import RECEIPT, Session, earlier_sessions
from sft_dist.train.stragglers import RankTimes, line_of, of_ranks
from sft_dist.train.waste import waste_lines

# Of what a run was made with, what trackers are told at its end: settings they have, and the rest is of this machine.
TRACKED = ("versions", "identity", "topology")


@dataclass(frozen=True)
class Books:
    """Of one session, on rank 0. Nothing here stops a run: what cannot be written is told.

    Args:
        made_with: a part of the receipt (``receipt.made_with``).
    """

    folder: Path
    run: Run
    account: Account
    made_with: dict[str, Any]

    @classmethod
    def open(
        cls,
        run: Run,
        data: PreparedData,
        outlook: Outlook,
        made_with: dict[str, Any],
        *,
        num_steps: int,
        completed: int,
        started: float,
    ) -> Books:
        """Call it before ``metrics.jsonl`` is shortened: what it has of lost steps was paid.

        Args:
            data: training data.
            completed: steps behind this session.
            started: on ``time.perf_counter``, when its wall time began.
        """
        folder = Path(run.output_dir)
        session = Session(started=datetime.now(UTC).isoformat(timespec="seconds"), first_step=completed + 1)
        earlier = earlier_sessions(folder)
        account = Account(run, data, outlook, earlier=earlier, session=session, num_steps=num_steps, started=started)
        return cls(folder, run, account, made_with)

    def begin(self, logger: RunLogger) -> None:
        """The run directory is taken: the receipt names the session from here on."""
        outlook = self.account.outlook
        for line in outlook.missing:
            if line != NO_GPU:
                logger.say(f"[yellow]plan      {escape(line)}")
        told = _told(outlook)
        if told:
            logger.say(f"plan      {told}")
        self._write(logger, self.account.sessions())

    def close(
        self,
        logger: RunLogger,
        state: FinalState,
        weights: str,
        *,
        peak_allocated_bytes: int | None,
        ranks: Sequence[RankTimes],
    ) -> None:
        """The run is finished, and ``final/`` is there, of ``state``; ``weights`` is the digest of what is in it."""
        account, outlook = self.account, self.account.outlook
        sessions, waste = account.sessions(ended=True), account.waste()
        actual = measured(self.folder, account, sessions, peak_allocated_bytes=peak_allocated_bytes)
        came_to = {
            **state.of_receipt(),
            "weights": weights,
            **measures(outlook.expected, actual, waste),
            **of_ranks(ranks),
        }
        self._write(logger, sessions, actual=came_to)
        logger.conclude(
            {"made_with": {key: self.made_with[key] for key in TRACKED}, **planned(outlook), **came_to},
            self.folder / "final",
        )
        logger.say(waste_lines(waste, outlook.price))
        if len(ranks) > 1:
            logger.say(escape(line_of(ranks)))
        logger.say(f"receipt   {'; '.join([str(self.folder / RECEIPT), *_compared(outlook.expected, actual)])}")
        if outlook.price is not None and actual.cost_usd is not None:
            logger.say(
                f"bill      {outlook.price.both(actual.cost_usd)} for {duration(actual.total_s)} at "
                f"{format_usd(outlook.price.usd)} an hour ({escape(outlook.price.name)})"
            )
        told = feed_calibration(self.run, outlook, actual)
        if told is not None:
            logger.say(f"[yellow]{escape(told)}")

    def break_off(self, logger: RunLogger) -> None:
        """The session ends before the run does, by a signal: its wall time and price are known."""
        self._write(logger, self.account.sessions())

    def _write(self, logger: RunLogger, sessions: tuple[Session, ...], **more: dict[str, Any]) -> None:
        parts = {"made_with": self.made_with, "planned": planned(self.account.outlook), **more}
        try:
            write_receipt(self.folder, sessions, **parts)
        except OSError as error:
            logger.say(f"[yellow]{RECEIPT} cannot be written: {escape(str(error))}")


def _told(outlook: Outlook) -> str:
    """What is planned of memory, time and money, in a line; empty where nothing is."""
    expected, price, parts = outlook.expected, outlook.price, []
    if expected is not None and outlook.machines is not None:
        parts.append(f"{gib(expected.peak_allocated_bytes)} of device memory at the peak")
    if expected is not None and expected.step_s is not None and expected.total_s is not None:
        parts.append(f"{step_seconds(expected.step_s)} a step, {duration(expected.total_s)} in all")
    if price is not None:
        parts.append(f"{format_usd(price.usd)} an hour ({escape(price.name)})")
        if expected is not None and expected.total_s is not None:
            parts.append(f"{price.both(price.usd_of(expected.total_s))} in all")
    return "; ".join(parts)


def _compared(expected: Expected | None, actual: Actual) -> list[str]:
    """Plan and measurement where both have a figure."""
    if expected is None:
        return []
    found = ratios(expected, actual)
    texts = {"peak_allocated_bytes": gib, "step_s": step_seconds, "total_s": duration}
    words = {"peak_allocated_bytes": "peak", "step_s": "a step", "total_s": "in all"}
    return [
        f"{words[key]} {text(getattr(actual, key))}, planned {text(getattr(expected, key))} ({found[key]:.2f} times)"
        for key, text in texts.items()
        if found[key] is not None
    ]
