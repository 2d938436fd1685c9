"""Pictures of a plan's page, as SVG that takes its colours from the page's style sheet. Imports no torch.

Bars have no text inside and are stretched to the page's width; names and figures stand beside them, as the page's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.result import MemoryPlan, ParetoPoint, Phase, TimePlan
from sft_dist.plan.units import HOUR_S, duration, gib, percent, step_seconds
from sft_dist.plan.words import PARTS, PHASES

BAR_WIDTH, BAR_HEIGHT = 1000, 26

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 20, 52

# Average width of a character at the labels' size.
CHARACTER = 6.4
LABEL_HEIGHT = 15

# Where the largest figure is so many times the least, an axis is logarithmic.
LOG_FROM = 8

# How many hues the style sheet has for parts of a step.
STEP_HUES = 8


def memory_bar(phase: Phase, memory: MemoryPlan) -> str:
    """A phase's parts one after the other, and a line where usable memory ends."""
    whole = max(memory.device_bytes, *(each.total_bytes for each in memory.phases))
    pieces = [
        (f"p-{part}", size, f"{PARTS[part][1]}: {gib(size)}") for part in PARTS if (size := phase.parts.get(part, 0))
    ]
    usable = BAR_WIDTH * memory.usable_bytes / whole
    outside = f'<rect class="outside" x="{usable:.1f}" width="{BAR_WIDTH - usable:.1f}" y="0" height="{BAR_HEIGHT}"/>'
    end = (
        f'<line class="end" x1="{usable:.1f}" x2="{usable:.1f}" y1="0" y2="{BAR_HEIGHT}">'
        f"<title>usable: {gib(memory.usable_bytes)}</title></line>"
    )
    label = f"{PHASES[phase.name]}: {gib(phase.total_bytes)} of {gib(memory.usable_bytes)} usable"
    return _bar(outside + _stacked(pieces, whole) + end, label)


def step_bar(time: TimePlan) -> str:
    """A step's parts one after the other."""
    whole = sum(time.step_parts.values()) or 1.0
    pieces = [
        (step_hue(number), seconds, f"{name}: {step_seconds(seconds)}, {percent(seconds / whole)}")
        for number, (name, seconds) in enumerate(time.step_parts.items())
    ]
    return _bar(_stacked(pieces, whole), f"A step of {step_seconds(time.step.value)} by what takes it")


def step_hue(number: int) -> str:
    """The class of the step's part of this number."""
    return f"s-{number % STEP_HUES}"


def _stacked(pieces: Sequence[tuple[str, float, str]], whole: float) -> str:
    """Rectangles of (class, size, title), one after the other."""
    drawn, reached = [], 0.0
    for style, size, title in pieces:
        width = BAR_WIDTH * size / whole
        drawn.append(
            f'<rect class="piece {style}" x="{reached:.2f}" width="{width:.2f}" y="0" height="{BAR_HEIGHT}">'
            f"<title>{escape(title)}</title></rect>"
        )
        reached += width
    return "".join(drawn)


def _bar(content: str, label: str) -> str:
    return (
        f'<svg class="bar" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label, quote=True)}">{content}</svg>'
    )


@dataclass(frozen=True)
class Axis:
    """From figures to places along an axis: straight, or logarithmic where the figures lie far apart.

    Args:
        low, high: figures at its ends, not negative; above zero where it is logarithmic.
        start, end: places there.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def at(self, figure: float) -> float:
        low, high, value = self.low, self.high, figure
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round figures within the axis, 1, 2 and 5 times powers of ten."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            figures = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            step = _round_step((self.high - self.low) / 6)
            figures = [step * number for number in range(math.ceil(self.high / step) + 1)]
        return [figure for figure in figures if self.low <= figure <= self.high]


def axis_of(figures: Sequence[float], start: float, end: float) -> Axis:
    """An axis with room for all of the figures."""
    least, most = min(figures), max(figures)
    if least > 0 and most / least >= LOG_FROM:
        return Axis(least / 1.25, most * 1.25, start, end, is_log=True)
    return Axis(0.0, most * 1.08 or 1.0, start, end, is_log=False)


def _round_step(at_least: float) -> float:
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= at_least)


def pareto(points: Sequence[ParetoPoint], *, jpy_per_usd: float) -> str:
    """Hours against dollars of each point; the front as a line with names, what does not fit as crosses."""
    across = axis_of([point.hours for point in points], LEFT, WIDTH - RIGHT)
    up = axis_of([point.usd for point in points], HEIGHT - BOTTOM, TOP)
    front = sorted((point for point in points if point.on_front), key=lambda point: point.hours)
    places = " ".join(f"{across.at(point.hours):.1f},{up.at(point.usd):.1f}" for point in front)
    line = f'<polyline class="front-line" points="{places}"/>' if len(front) > 1 else ""
    # The front last, so that it lies on top.
    ordered = [*(point for point in points if not point.on_front), *front]
    drawn = [_point(point, across.at(point.hours), up.at(point.usd), jpy_per_usd) for point in ordered]
    label = f"{len(points)} configurations by hours and dollars, {len(front)} of them on the front"
    return (
        f'<svg class="pareto" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{_axes(across, up)}{line}{_names(points, front, across, up)}{''.join(drawn)}</svg>"
    )


def _point(point: ParetoPoint, x: float, y: float, jpy_per_usd: float) -> str:
    said = [
        point.label,
        duration(point.hours * HOUR_S),
        f"{format_usd(point.usd)}, {format_jpy(point.usd * jpy_per_usd)}",
    ]
    said += [] if point.fits else ["does not fit"]
    said += ["on the front"] if point.on_front else []
    title = f"<title>{escape(chr(10).join(said))}</title>"
    if not point.fits:
        arms = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return f'<path class="point misfit" d="{arms}">{title}</path>'
    style, radius = ("front", 6) if point.on_front else ("other", 4.5)
    return f'<circle class="point {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>'


def _axes(across: Axis, up: Axis) -> str:
    """Lines of the grid with their figures, and what they count."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for figure in across.ticks():
        x = across.at(figure)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_plain(figure)}</text>')
    for figure in up.ticks():
        y = up.at(figure)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = escape(f"${_plain(figure)}")
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="name" x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"hours{_scale(across)}</text>"
        f'<text class="name" x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"USD{_scale(up)}</text>"
    )
    return "".join(parts)


def _scale(axis: Axis) -> str:
    return ", logarithmic" if axis.is_log else ""


def _plain(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 10 else f"{figure:g}"


def _names(points: Sequence[ParetoPoint], front: Sequence[ParetoPoint], across: Axis, up: Axis) -> str:
    """Names beside the points of the front, where they cover nothing; the table has them all."""
    places = [(across.at(point.hours), up.at(point.usd)) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    drawn = []
    for point in front:
        width = len(point.label) * CHARACTER
        x, y = across.at(point.hours), up.at(point.usd)
        for left, bottom in _around(x, y, width):
            box = (left, bottom - LABEL_HEIGHT, left + width, bottom + 3)
            inside = left >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                near = min(max(x, left), box[2]), bottom + 3 if bottom < y else box[1] + 2
                drawn.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>')
                drawn.append(f'<text class="label" x="{left:.1f}" y="{bottom:.1f}">{escape(point.label)}</text>')
                break
    return "".join(drawn)


def _around(x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Where the lower left corner of a name may lie, the best first: below, above, and further away."""
    lines = (y + 24, y - 11, y + 40, y - 27, y + 56)
    return [(left, line) for line in lines for left in (x - width / 2, x - width + 8, x - 8)]


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
