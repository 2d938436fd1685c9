"""``metrics.jsonl`` by columns: what each step measured, evaluations, events. Imports no torch.

A line that nobody understands is counted and left out. A value that was not finite is NaN here;
None is one that the line does not have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.cluster.happened import in_words
from sft_dist.metrics.logger import METRICS

# Of a training line, what is read besides its step.
COLUMNS = (
    "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_gib", "step_time_s", "num_tokens", "supervised_tokens",
    "elapsed_s", "mfu",
)  # fmt: skip

# The first steps of a process compile, allocate and fill caches.
WARM_UP_STEPS = 2

Value = float | None


@dataclass(frozen=True)
class Evaluation:
    """
    Args:
        step: completed steps.
        scores: by key of the line, such as ``eval_loss``; NaN: not finite.
    """

    step: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Event:
    """
    Args:
        name: such as ``skipped`` or ``rolled_back``.
        told: what else its line says, in words.
    """

    step: int
    name: str
    told: str


@dataclass(frozen=True)
class Metrics:
    """
    Args:
        steps: in ascending order; of a step that was trained again, the last time.
        columns: by name of ``COLUMNS``, a value a step.
        unread: lines that could not be read.
    """

    steps: tuple[int, ...] = ()
    columns: dict[str, tuple[Value, ...]] | None = None
    evaluations: tuple[Evaluation, ...] = ()
    events: tuple[Event, ...] = ()
    unread: int = 0

    def column(self, name: str) -> tuple[Value, ...]:
        return () if self.columns is None else self.columns[name]

    def finite(self, name: str) -> list[float]:
        return [value for value in self.column(name) if value is not None and math.isfinite(value)]

    def steady(self, name: str) -> list[float]:
        """Finite values of all steps but the first ones, where there are others."""
        values = self.finite(name)
        return values[WARM_UP_STEPS:] or values

    @property
    def tokens_per_s(self) -> float | None:
        """Of all ranks: the tokens of the steady steps by their time, so that a short step counts as much as it is."""
        tokens, seconds = self.steady("num_tokens"), self.steady("step_time_s")
        return sum(tokens) / sum(seconds) if len(tokens) == len(seconds) and sum(seconds) > 0 else None

    def score_keys(self) -> list[str]:
        """Of all evaluations, in the order of their first line."""
        return list(dict.fromkeys(key for each in self.evaluations for key in each.scores))

    def scores(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of each evaluation that has it."""
        return [(each.step, each.scores[key]) for each in self.evaluations if key in each.scores]


def read_metrics(folder: Path) -> Metrics:
    """Of a run directory; of nothing where it has none."""
    try:
        content = (folder / METRICS).read_bytes()
    except OSError:
        return Metrics()
    return parse_metrics(content.splitlines(keepends=True))


def parse_metrics(lines: Iterable[bytes]) -> Metrics:
    """Of the lines of a file, with their ends; one without is being written, or was when its process died."""
    trained: list[dict[str, Any]] = []
    evaluations: dict[int, dict[str, float]] = {}
    events: list[Event] = []
    unread = 0
    for text in lines:
        if not text.endswith(b"\n"):
            continue
        line = _line(text)
        if line is None:
            unread += bool(text.strip())
            continue
        step = line["step"]
        if "event" in line:
            events.append(Event(step, str(line["event"]), _told(line)))
        if "loss" in line:
            # What follows a return to an earlier step replaces what was there.
            while trained and trained[-1]["step"] >= step:
                trained.pop()
            trained.append(line)
        scores = {key: _value(line, key) for key in line if key.startswith("eval_")}
        known = {key: value for key, value in scores.items() if value is not None}
        if known:
            evaluations[step] = evaluations.get(step, {}) | known
    return Metrics(
        steps=tuple(line["step"] for line in trained),
        columns={key: tuple(_value(line, key) for line in trained) for key in COLUMNS},
        evaluations=tuple(Evaluation(step, scores) for step, scores in sorted(evaluations.items())),
        events=tuple(events),
        unread=unread,
    )


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    is_known = isinstance(line, dict) and isinstance(line.get("step"), int) and not isinstance(line["step"], bool)
    return line if is_known else None


def _value(line: dict[str, Any], key: str) -> Value:
    value = line.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    # The logger writes null for what is not finite, and names it.
    return math.nan if value is None and key in line.get("non_finite", ()) else None


def _told(line: dict[str, Any]) -> str:
    words = in_words(line)
    if words is not None:
        return words
    said = {key: value for key, value in line.items() if key not in ("step", "event") and value is not None}
    return ", ".join(
        f"{plain(key)} {value:.6g}" if isinstance(value, float) else f"{plain(key)} {value}"
        for key, value in said.items()
        if isinstance(value, int | float | str)
    )


def plain(key: str) -> str:
    """``early_stopping/best_step`` is ``best step``: a key in words."""
    return key.rpartition("/")[2].replace("_", " ")
