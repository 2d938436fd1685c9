"""What went wrong in a run, ended it or not: from its ``metrics.jsonl`` and from ``stalls/``. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.cluster.nodes import STALLS, VERDICT

Line = dict[str, Any]


@dataclass(frozen=True)
class Happened:
    """The last one of a kind.

    Args:
        kind: its event in ``metrics.jsonl``, or stalled.
        step: that it is about; None: not known.
        told: in words.
        times: how often that is in the run's files.
    """

    kind: str
    step: int | None
    told: str
    times: int


def happened(folder: Path, lines: Iterable[Line]) -> tuple[Happened, ...]:
    """By step, a kind once.

    Args:
        folder: the run directory.
        lines: of its ``metrics.jsonl``.
    """
    found: dict[str, Happened] = {}
    for line in lines:
        kind = line.get("event")
        if kind not in TOLD or (kind == "skipped" and line.get("because") == "rolled_back"):
            continue  # the run comes by a step that it has told of
        step = line.get("of_step", line["step"])
        times = found[kind].times + 1 if kind in found else 1
        found[kind] = Happened(kind, step, TOLD[kind](line), times)
    stall = _stall(folder)
    return tuple(sorted((*found.values(), *stall), key=lambda each: -1 if each.step is None else each.step))


def _stall(folder: Path) -> list[Happened]:
    """Starts are named by their time, so the last name is the last stall."""
    verdicts = sorted(folder.glob(f"{STALLS}/*/{VERDICT}"))
    for file in reversed(verdicts):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return [Happened("stalled", found["step"], str(found["what"]), len(verdicts))]
        except (OSError, ValueError, KeyError, TypeError):  # gone, or cut short
            continue
    return []


def _trouble(line: Line) -> str:
    """``loss 9.214, median 2.104, rank 3``, of a line that the guard has written."""
    parts = [
        f"{name} {line[key]:.4f}" if isinstance(line.get(key), int | float) else f"{name} not finite"
        for key, name in (("of_loss", "loss"), ("median_loss", "median"))
        if key in line
    ]
    ranks = line.get("ranks") or []
    if ranks:
        parts.append(("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks)))
    return ", ".join(parts)


def _because(line: Line) -> str:
    return "not finite" if line.get("because") == "non_finite" else "a spike"


TOLD: dict[str, Callable[[Line], str]] = {
    "spike": lambda line: f"a spike, trained all the same ({_trouble(line)})",
    "non_finite": lambda line: f"not finite, the run ended ({_trouble(line)})",
    "skipped": lambda line: f"left out: {_because(line)} ({_trouble(line)})",
    "rolled_back": lambda line: f"left out: {_because(line)} ({_trouble(line)}); back to step {line['step']:,}",
    "non_finite_evaluation": lambda line: f"its evaluation is not finite ({line.get('of_metrics', 'eval_loss')})",
    "overfitting": lambda line: "the run overfits" + _best(line),
}


def in_words(line: Line) -> str | None:
    """An event's line, told beside its step; None: of a kind that has no words here."""
    kind, of_step = line.get("event"), line.get("of_step")
    if kind == "skipped" and line.get("because") == "rolled_back":
        return "left out: the run had gone back because of it"
    if kind not in TOLD:
        return None
    about = f"step {of_step:,} " if isinstance(of_step, int) and of_step != line["step"] else ""
    return about + TOLD[kind](line)


def _best(line: Line) -> str:
    best = line.get("best_eval_step")
    return "" if best is None else f", its best evaluation is that of step {best:,}"
