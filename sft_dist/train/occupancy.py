"""How full the micro-batches of steps are: what empty ones and ranks with fewer tokens cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import dealt
from sft_dist.run import StrategyName

# Under the other strategies ranks meet in every micro-batch: they gather weights or reduce gradients.
MEETS_ONCE_A_STEP: tuple[StrategyName, ...] = ("ddp", "zero1")


@dataclass(frozen=True)
class Occupancy:
    """How full the micro-batches of one or more steps are, over all ranks.

    Args:
        passes: micro-batches of all ranks; idle: of them, empty ones.
        tokens: that were trained; slots: that could have been while the fullest rank was at work.
        sequences: packs or rows.
    """

    passes: int = 0
    idle: int = 0
    tokens: int = 0
    slots: int = 0
    sequences: int = 0

    def __add__(self, other: Occupancy) -> Occupancy:
        return Occupancy(*(getattr(self, key) + getattr(other, key) for key in self.__dataclass_fields__))

    @property
    def idle_share(self) -> float:
        return self.idle / self.passes if self.passes else 0.0

    @property
    def uneven_share(self) -> float:
        """Of the ranks' time, by tokens: what those with fewer wait for the one with most, beside empty passes."""
        return max(0.0, 1 - self.tokens / self.slots - self.idle_share) if self.slots else 0.0


def occupancy(tokens: NDArray[np.int64], batch: BatchPlan, strategy: StrategyName) -> Occupancy:
    """Of one step.

    Args:
        tokens: [sequences] of the step, in its order; they are dealt round-robin (``loader.micro_batches``).
    """
    of_pass = dealt(tokens, batch).sum(axis=1)
    fullest = of_pass.sum(axis=0).max() if strategy in MEETS_ONCE_A_STEP else of_pass.max(axis=1).sum()
    return Occupancy(
        passes=of_pass.size,
        idle=int((of_pass == 0).sum()),
        tokens=int(tokens.sum()),
        slots=int(fullest) * batch.world_size,
        sequences=len(tokens),
    )
