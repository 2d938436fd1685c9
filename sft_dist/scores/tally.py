"""A score as a function of how often each example counts.

Once counts the whole set; 0 or 1 a part of it; the number of draws a bootstrap resample. So the score of a resample is
computed from what was counted in each example, and no text is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Tally(Protocol):
    """What was counted in each of n examples, enough to compute a score of any choice of them."""

    def value(self, counts: Array) -> Array:
        """The score of each of k choices.

        Args:
            counts: [k, n], how often an example is in the choice; no row is all 0.

        Returns:
            [k].
        """
        ...

    def part(self, rows: Sequence[int]) -> Tally:
        """The tally of these examples alone."""
        ...


@dataclass(frozen=True)
class Mean:
    """A score that is the mean of its examples.

    Args:
        values: [n], of each example.
    """

    values: Array

    def value(self, counts: Array) -> Array:
        mean: Array = counts @ self.values / counts.sum(axis=1)
        return mean

    def part(self, rows: Sequence[int]) -> Self:
        return type(self)(self.values[list(rows)])


def mean_of(values: Sequence[float]) -> Mean:
    return Mean(np.array(values, dtype=np.float64))
