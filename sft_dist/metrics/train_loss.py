"""The one figure that stands for the training loss of a run: that of a single step says more of its batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Whose mean it is.
LOSS_OF_STEPS = 10


def train_loss(losses: Sequence[float]) -> float | None:
    """Mean of the last steps; None without any, and where one of them is not finite: the run has diverged.

    Args:
        losses: of each step, in order; what ``metrics.jsonl`` has as null is NaN.
    """
    last = losses[-LOSS_OF_STEPS:]
    return statistics.fmean(last) if last and all(map(math.isfinite, last)) else None
