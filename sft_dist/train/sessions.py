"""The sessions of a run: it is paid from the start of the first to the end of the last one, less the time between.

They are in ``receipt.json`` from the start of each. What a session that was killed took is known by the last line that
it wrote to ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sft_dist.export.provenance import RECEIPT as RECEIPT
from sft_dist.metrics.logger import METRICS


@dataclass(frozen=True)
class Session:
    """One start of a run.

    Args:
        started: ISO 8601.
        first_step: the one that it began with, 1-based.
        elapsed_s: wall time, of a session that did not end until its last line.
        cost_usd: None where no price was known.
        ended: whether it came to its end.
        preempted_by: name of the signal after which it saved and stopped; else None.
    """

    started: str
    first_step: int
    elapsed_s: float = 0.0
    cost_usd: float | None = None
    ended: bool = False
    preempted_by: str | None = None


_SESSIONS = TypeAdapter(tuple[Session, ...])


def earlier_sessions(folder: Path) -> tuple[Session, ...]:
    """Those of the run in a folder; none where no run is.

    Call it before ``metrics.jsonl`` is shortened to the steps that are behind a checkpoint: the others were paid too.
    """
    if not (folder / METRICS).exists():
        return ()
    known = _written(folder / RECEIPT)
    line = _latest(folder / METRICS)
    if line is None or (known and known[-1].ended):
        return known
    last = known[-1] if known else Session(started="", first_step=1)
    before = known[:-1]
    elapsed_s = max(last.elapsed_s, line["elapsed_s"] - sum(s.elapsed_s for s in before))
    cost = line.get("cost_usd")
    if cost is not None:
        cost = max(last.cost_usd or 0.0, cost - (total_usd(before) or 0.0))
    return (*before, replace(last, elapsed_s=elapsed_s, cost_usd=cost))


def total_usd(sessions: Sequence[Session]) -> float | None:
    """Of those whose price was known; None where none was."""
    known = [session.cost_usd for session in sessions if session.cost_usd is not None]
    return sum(known) if known else None


def _written(receipt: Path) -> tuple[Session, ...]:
    """A receipt that is damaged or of another shape counts as absent: ``metrics.jsonl`` has the sum."""
    try:
        return _SESSIONS.validate_python(json.loads(receipt.read_text(encoding="utf-8"))["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _latest(metrics: Path) -> dict[str, Any] | None:
    """The line of the most elapsed time; None where no line has any."""
    lines = []
    for text in metrics.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a dying process
        if isinstance(line, dict) and isinstance(line.get("elapsed_s"), int | float):
            lines.append(line)
    return max(lines, key=lambda line: line["elapsed_s"], default=None)
