"""From a value a step to what a picture of some hundred pixels can show, without hiding a spike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

# Points of a curve: more than a screen is wide in a panel, and few enough for a small page.
MAX_POINTS = 500

# How far neighbours count for the smoothed curve, as a share of all steps; fewer steps than these are not smoothed.
SMOOTHED_SHARE, LEAST_SMOOTHED = 0.012, 20

Value = float | None


@dataclass(frozen=True)
class Curve:
    """Values in ascending order of place, each of one step or of several that follow each other.

    Args:
        x: by the name of what is counted (``steps``, ``tokens``, ``hours``), the place of the last step of each.
        mean, low, high: of the finite ones of its steps; None where none is.
        smooth: mean around that place; empty where there are too few steps.
        broken: places, by the same names, of steps whose value is not finite.
        of_steps: how many steps are one value, at most.
    """

    x: dict[str, tuple[float, ...]]
    mean: tuple[Value, ...]
    low: tuple[Value, ...]
    high: tuple[Value, ...]
    smooth: tuple[Value, ...]
    broken: dict[str, tuple[float, ...]]
    of_steps: int

    @property
    def is_exact(self) -> bool:
        return self.of_steps <= 1


def curve(
    x: Mapping[str, Sequence[float]], values: Sequence[Value], *, smooths: bool = True, max_points: int = MAX_POINTS
) -> Curve:
    """
    Args:
        x: by name, a place for each value.
        values: NaN: not finite; None: not measured.
        smooths: whether noise is what hides the course of the values.
    """
    smooth = smoothed(values) if smooths else []
    of_steps = max(1, math.ceil(len(values) / max_points))
    parts = [slice(first, first + of_steps) for first in range(0, len(values), of_steps)]
    finite = [[v for v in values[part] if v is not None and math.isfinite(v)] for part in parts]
    bad = [i for i, v in enumerate(values) if v is not None and not math.isfinite(v)]
    return Curve(
        x={name: tuple(places[part][-1] for part in parts) for name, places in x.items()},
        mean=tuple(math.fsum(each) / len(each) if each else None for each in finite),
        low=tuple(min(each, default=None) for each in finite),
        high=tuple(max(each, default=None) for each in finite),
        smooth=tuple(smooth[part][-1] for part in parts) if smooth else (),
        broken={name: tuple(places[i] for i in bad) for name, places in x.items()},
        of_steps=of_steps,
    )


def smoothed(values: Sequence[Value]) -> list[Value]:
    """Mean of each value and its neighbours; empty for few values. What is not finite has none and does not count.

    As many neighbours behind as before it, so that it lies neither above nor below a loss that falls; at the end, where
    there are none behind, those before it.
    """
    if len(values) < LEAST_SMOOTHED:
        return []
    radius = max(1, round(SMOOTHED_SHARE * len(values)))
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    sums = [0.0, *accumulate(value or 0.0 for value in finite)]
    counts = [0, *accumulate(value is not None for value in finite)]
    means: list[Value] = []
    for i in range(len(values)):
        near = min(radius, i)
        first, stop = i - near, min(i + near + 1, len(values))
        count = counts[stop] - counts[first]
        means.append((sums[stop] - sums[first]) / count if finite[i] is not None else None)
    return means


def evenly(count: int, most: int) -> list[int]:
    """Numbers of at most so many of ``count`` things, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
