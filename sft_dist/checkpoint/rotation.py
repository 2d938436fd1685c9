"""Which checkpoints stay, and the deletion of those that do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import Position
from sft_dist.config.control_schema import Goal
from sft_dist.config.schema import CheckpointConfig

SECONDS_PER_HOUR = 3600.0


def rotate(folder: Path, rules: CheckpointConfig) -> list[Path]:
    """Deletes what no rule keeps, and says what that was. A checkpoint whose manifest cannot be read is left alone."""
    there = {
        manifest.completed_steps: (path, manifest.position) for path, manifest in store.readable_checkpoints(folder)
    }
    gone = [there[step][0] for step in superfluous([position for _, position in there.values()], rules)]
    for path in gone:
        store.delete(path)
    return gone


def superfluous(there: Sequence[Position], rules: CheckpointConfig) -> list[int]:
    """Steps of the checkpoints that no rule keeps, oldest first.

    Hours are those that the run has trained, which no clock that is put back can change.

    Args:
        there: of all complete checkpoints.
    """
    in_order = sorted(there, key=lambda position: position.completed_steps)
    kept = {position.completed_steps for position in in_order[-rules.keep_last :]}
    if rules.keep_every_hours is not None:
        periods: dict[int, int] = {}
        for position in in_order:
            period = int(position.trained_s / (rules.keep_every_hours * SECONDS_PER_HOUR))
            if period:
                periods.setdefault(period, position.completed_steps)
        kept |= set(periods.values())
    best = best_of(there, rules.goal)
    if rules.keep_best and best is not None:
        kept.add(best.completed_steps)
    return [p.completed_steps for p in in_order if p.completed_steps not in kept]


def best_of(there: Sequence[Position], goal: Goal) -> Position | None:
    """The one with the best value of a metric, the earliest of equals; None where none has any."""
    values = {p.completed_steps: value for p in there if (value := p.value_of(goal.metric)) is not None}
    evaluated = [position for position in there if position.completed_steps in values]
    return min(evaluated, key=lambda p: (goal.sortable(values[p.completed_steps]), p.completed_steps), default=None)
