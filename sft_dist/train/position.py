"""What a run does next, as far as the number of the step decides it: everything but the weights."""

from __future__ import annotations

from sft_dist.checkpoint.manifest import Position
from sft_dist.data.loader import TrainingOrder
from sft_dist.run import Run
from sft_dist.runtime.seeding import rng_digest
from sft_dist.sharding.optim import learning_rate


def position_after(run: Run, order: TrainingOrder, completed_steps: int, *, num_steps: int) -> Position:
    """Where a run is after so many of its ``num_steps``; without what was measured of it."""
    is_end = completed_steps == num_steps
    return Position(
        completed_steps=completed_steps,
        next_sequences=() if is_end else tuple(order.step(completed_steps).sequences.tolist()),
        next_lr=None if is_end else learning_rate(run.optim, completed_steps, num_steps),
        next_rng=rng_digest(run.seed, completed_steps, 0),
    )
