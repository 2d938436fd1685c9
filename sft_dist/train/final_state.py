"""Which state ``final/`` is exported from: the last one of the run, or that of its best evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sft_dist.checkpoint import store
from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.manifest import Position, Waiting
from sft_dist.errors import CheckpointError
from sft_dist.run import Run
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.early_stopping import has_fired
from sft_dist.train.starting_point import damage


@dataclass(frozen=True)
class FinalState:
    """
    Args:
        step: that the state is of; trained_steps: of the run.
        num_steps: that were planned.
        metric, value: by which it is the best; None of the last state.
        stopped_early: whether early stopping has ended the run.
    """

    step: int
    trained_steps: int
    num_steps: int
    metric: str | None = None
    value: float | None = None
    stopped_early: bool = False

    def told(self) -> str:
        """For a model card, in a line."""
        end = f"stopped early after step {self.trained_steps:,} of {self.num_steps:,}" if self.stopped_early else ""
        if self.metric is None or self.value is None:
            return f"of step {self.step:,}, the last one" + (f"; {end}" if end else "")
        best = f"of step {self.step:,}, the best evaluation: {self.metric} {self.value:.4f}"
        return f"{best}; training {end or f'ended after step {self.trained_steps:,}'}"

    def of_receipt(self) -> dict[str, Any]:
        return {"final": asdict(self)}


def take_final_state(
    run: Run, checkpointer: Checkpointer, strategy: Strategy, *, completed: int, num_steps: int, waiting: Waiting | None
) -> FinalState:
    """Leaves in ``strategy`` the state that is to be exported; every rank must call it. Nothing may be in flight.

    Args:
        completed: steps behind the state that is there.
        waiting: of early stopping, at the end of the run.

    Raises:
        CheckpointError: on every rank; the best checkpoint is damaged.
    """
    stopped = has_fired(run.early_stopping, waiting)
    last = FinalState(completed, completed, num_steps, stopped_early=stopped)
    if run.checkpoint.final != "best":
        return last
    best: Position | None = checkpointer.best()
    if best is None:  # no evaluated state could be saved; the caller sees that it is the last one
        return last
    if best.completed_steps != completed:
        checkpoint = checkpointer.folder / store.name_of(best.completed_steps)
        problems = damage(checkpoint)
        if problems:
            raise CheckpointError(
                f"{checkpoint}, the best one, is damaged: {problems[0]}",
                fix="move it away and say --resume auto, which exports the next best, or set checkpoint.final to last",
            ).everywhere()
        checkpointer.load(checkpoint, strategy)
    metric = run.checkpoint.goal.metric
    return FinalState(best.completed_steps, completed, num_steps, metric, best.value_of(metric), stopped_early=stopped)
