"""Axes of a picture: from figures to places, with round figures to write beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Pictures are drawn in a square of this size and stretched to the place that there is.
SIZE = 1000

# Round figures on an axis, about.
NUM_TICKS = 5

# That count, of a figure beside an axis: more have no room there.
MOST_DIGITS = 5

# A straight axis begins at 0 where its least figure is below this share of its largest.
FROM_ZERO_SHARE = 0.4


@dataclass(frozen=True)
class Axis:
    """
    Args:
        low, high: figures at its ends, apart; above 0 where it is logarithmic.
        ticks: round figures within.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def share(self, figure: float) -> float:
        """Where a figure lies, from 0 at the low end to 1; beyond them outside."""
        if self.is_log:
            return (math.log(figure) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (figure - self.low) / (self.high - self.low)

    def at(self, figure: float, *, upwards: bool = False) -> float:
        """Place in the picture; ``upwards``: of an axis that runs from the bottom to the top."""
        share = self.share(figure)
        return SIZE * (1 - share if upwards else share)

    def can_show(self, figure: float | None) -> bool:
        return figure is not None and math.isfinite(figure) and (not self.is_log or figure > 0)


def straight(figures: Iterable[float], *, whole: bool = False, tight: bool = False, of_share: bool = False) -> Axis:
    """With room for all finite figures.

    Args:
        whole: ticks are whole numbers.
        tight: ends at the figures themselves.
        of_share: the figures are shares, and one alone is shown between 0 and 1.
    """
    finite = [figure for figure in figures if math.isfinite(figure)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low == high and (low == 0 or (of_share and 0 <= low <= 1)):
        low, high = 0.0, 1.0
    elif low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    elif not tight:
        margin = 0.04 * (high - low)
        low = 0.0 if 0 <= low < FROM_ZERO_SHARE * high else low - margin
        high += margin
    step = _round_step((high - low) / NUM_TICKS)
    step = max(1.0, step) if whole else step
    # Beside a large figure, steps that a float cannot tell apart would be one tick many times.
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return Axis(low, high, tuple(number * step for number in numbers))


def logarithmic(figures: Iterable[float]) -> Axis | None:
    """With room for all figures above 0; None where there are none."""
    above = [figure for figure in figures if math.isfinite(figure) and figure > 0]
    if not above:
        return None
    low, high = min(above) / 1.1, max(above) * 1.1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = math.log10(high / low)
    if decades > NUM_TICKS:
        every = math.ceil(decades / NUM_TICKS)
        marks = [10.0**power for power in powers if power % every == 0]
    else:
        digits = (1,) if decades > 3 else (1, 2, 5)
        marks = [digit * 10.0**power for power in powers for digit in digits]
    ticks = [mark for mark in marks if low <= mark <= high]
    if len(ticks) < 2:  # less than from one round figure to the next
        step = _round_step((high - low) / NUM_TICKS)
        ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(low, high, tuple(ticks), is_log=True)


def _round_step(at_least: float) -> float:
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= at_least * (1 - 1e-9))


def labels(ticks: Sequence[float]) -> list[str]:
    """Of the ticks of an axis. Where they are too close to be told apart in the room that there is, the first alone."""
    texts = [short(tick) for tick in ticks]
    if len(set(texts)) < len(texts):
        texts = [short(tick, MOST_DIGITS) for tick in ticks]
    return [text if text not in texts[:number] else "" for number, text in enumerate(texts)]


def short(figure: float, digits: int = 4) -> str:
    """``12,000``, ``1.5 M``, ``0.25``, ``2e-5``: a round figure beside an axis.

    Args:
        digits: that count, at most; above 1,000 the whole part is always there.
    """
    size = abs(figure)
    if size >= 1e6:
        for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
            if size >= scale:
                return f"{figure / scale:.{digits}g} {unit}"
    if size >= 1000:
        return f"{figure:,.{max(0, digits - len(str(int(size))))}f}"
    if size == 0 or size >= 0.001:
        return f"{figure:.{digits}g}"
    written, _, power = f"{figure:.{digits - 1}e}".partition("e")
    return f"{written.rstrip('0').rstrip('.')}e{int(power)}"
