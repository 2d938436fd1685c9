"""Time that a run pays for and that trains nothing: where it goes, and what it costs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.plan.bill import HourlyPrice
from sft_dist.plan.units import duration, percent


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
