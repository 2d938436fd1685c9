"""What a learning rate range test found (Smith 2015, arXiv 1506.01186): losses by rate, and the rates they suggest.

Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Width of the window that smooths the curve, as a share of its steps, to both sides: a mean of what lies behind would
# show every rate too high.
SMOOTHING_SHARE = 0.025

# The test ends when the mean of the last steps is this many times the lowest such mean.
DIVERGED_TIMES, LAST_STEPS = 2.0, 3

# A share of how far the smoothed loss fell, by which it has to rise again to have turned.
TURNED_SHARE = 0.1

# The suggested rate is this share of the one from which the loss rises.
SAFE_SHARE = 0.1


def rates(least: float, most: float, steps: int) -> list[float]:
    """Equal factors from one to the next."""
    return [least * (most / least) ** (step / (steps - 1)) for step in range(steps)]


@dataclass(frozen=True)
class LrCurve:
    """
    Args:
        rates, losses: of the steps that were trained, in their order; the last loss may not be finite.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """Means of the losses around each step under a bell curve; without those that are not finite."""
        losses = np.array(self.losses)
        finite = np.isfinite(losses)
        steps = np.arange(len(losses))
        width = max(1.0, SMOOTHING_SHARE * len(losses))
        weights = np.exp(-0.5 * ((steps[:, None] - steps[None]) / width) ** 2) * finite
        return tuple((weights @ np.where(finite, losses, 0.0) / weights.sum(1)).tolist())

    @property
    def has_diverged(self) -> bool:
        """Whether the last step is one after which a test ends."""
        if not math.isfinite(self.losses[-1]):
            return True
        if len(self.losses) < LAST_STEPS:
            return False
        means = np.convolve(self.losses, np.full(LAST_STEPS, 1 / LAST_STEPS), "valid")
        return bool(means[-1] > DIVERGED_TIMES * means.min())

    @property
    def _lowest(self) -> int:
        smoothed = self.smoothed
        return smoothed.index(min(smoothed))

    @property
    def turning(self) -> float | None:
        """The rate from which the smoothed loss rises for good; None where it does not, or never fell."""
        smoothed, lowest = self.smoothed, self._lowest
        fell = smoothed[0] - smoothed[lowest]
        rose = self.has_diverged or max(smoothed[lowest:]) - smoothed[lowest] > TURNED_SHARE * fell
        return self.rates[lowest] if fell > 0 and rose else None

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls fastest by the logarithm of the rate; None where it never falls."""
        lowest = self._lowest
        if lowest < 2:
            return None
        slopes: NDArray[np.float64] = np.gradient(
            np.array(self.smoothed[: lowest + 1]), np.log(np.array(self.rates[: lowest + 1]))
        )
        return self.rates[int(slopes.argmin())] if slopes.min() < 0 else None

    @property
    def tenth(self) -> float | None:
        """A tenth of ``turning``."""
        return None if self.turning is None else SAFE_SHARE * self.turning

    @property
    def suggested(self) -> float | None:
        """The lower one of the two, which both are rules of thumb."""
        return min((rate for rate in (self.steepest, self.tenth) if rate is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """What ``lr_find.json`` holds; a loss that is not finite is null."""
        return {
            "suggested_lr": self.suggested,
            "steepest_lr": self.steepest,
            "tenth_of_turning_lr": self.tenth,
            "turning_lr": self.turning,
            "lr": list(self.rates),
            "loss": [loss if math.isfinite(loss) else None for loss in self.losses],
            "smoothed_loss": list(self.smoothed),
        }

    def told(self) -> list[str]:
        """Lines for people."""
        lines = []
        if self.steepest is not None:
            lines.append(f"steepest descent at {self.steepest:.2e}")
        if self.turning is not None:
            lines.append(f"the loss rises from {self.turning:.2e} on: a tenth of that is {self.tenth:.2e}")
        elif self.steepest is not None:
            lines.append(f"the loss did not rise up to {self.rates[-1]:.2e}: raise --max-lr to see where it does")
        if self.suggested is None:
            return [*lines, f"the loss never fell: lower --min-lr, which is {self.rates[0]:.2e}, or look at the data"]
        return [*lines, f"suggested: optim.lr={self.suggested:.1e}"]
