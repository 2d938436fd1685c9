"""Time that a run pays for and that trains nothing: where it goes, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import dealt
from sft_dist.plan.bill import HourlyPrice
from sft_dist.plan.units import duration, percent
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


@dataclass(frozen=True)
class Waste:
    """Of one session; seconds of wall time.

    Args:
        session_s: all of it.
        starting_s: before its first step, without the rehearsal, rehearsing_s; evaluating_s, saving_s: checkpoints;
            finishing_s: ``final/`` and its proof.
        data_wait_s: of training, rank 0's wait for its micro-batches.
        idle_s: of training, empty micro-batches: seconds that all ranks lose together. uneven_s: likewise, ranks with
            fewer tokens than the fullest.
        fill: tokens of a pack over its capacity; None where nothing is packed. Packs are not padded: a pack that is not
            full takes less time, and only what is the same for each pass is paid for nothing.
    """

    session_s: float
    starting_s: float
    rehearsing_s: float
    evaluating_s: float
    saving_s: float
    finishing_s: float
    data_wait_s: float
    idle_s: float
    uneven_s: float
    fill: float | None

    def shares(self) -> list[tuple[str, float]]:
        """(what, seconds) for people."""
        return [
            ("starting", self.starting_s),
            ("rehearsing", self.rehearsing_s),
            ("evaluating", self.evaluating_s),
            ("saving checkpoints", self.saving_s),
            ("writing and proving final/", self.finishing_s),
            ("waiting for data", self.data_wait_s),
            ("empty micro-batches", self.idle_s),
            ("ranks waiting for the fullest", self.uneven_s),
        ]


def waste_lines(waste: Waste, price: HourlyPrice | None) -> str:
    """Where the time of a session went that trained nothing, a line each, with the bill where a price is known."""

    def paid(seconds: float) -> str:
        return "" if price is None else f"  {price.both(price.usd_of(seconds))}"

    lines = [f"waste     of {duration(waste.session_s)}{paid(waste.session_s)}:"]
    for what, seconds in waste.shares():
        if not seconds:
            continue
        share = seconds / waste.session_s
        lines.append(f"  {what:<30}{percent(share):>6}  {duration(seconds):>8}{paid(seconds)}")
    if waste.fill is not None:
        lines.append(
            f"  packs are {waste.fill:.1%} full; they are not padded, so that what is free costs next to nothing"
        )
    return "\n".join(lines)
