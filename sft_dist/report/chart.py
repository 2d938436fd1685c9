"""A chart as HTML: lines stretched to the place that there is, and figures beside them that keep their size.

It shows all that it has without a script; ``chart.js`` adds values at the pointer and lets the reader choose the view.
Its parts are drawn for each view, a choice of what the horizontal axis counts and of a straight or logarithmic axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from sft_dist.report.axes import SIZE, Axis, labels, logarithmic, straight
from sft_dist.report.series import Curve, Value

# How many hues the style sheet has for lines.
HUES = 8

# What a view counts along its horizontal axis, in words.
COUNTS = {"steps": "step", "tokens": "tokens", "hours": "hours"}

Places = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Line:
    """
    Args:
        hue: number of its colour.
        shows_raw: what was measured is drawn too, below the smoothed curve.
    """

    name: str
    curve: Curve
    hue: int = 0
    shows_raw: bool = True


@dataclass(frozen=True)
class Dots:
    """Single values, joined by a thin line.

    Args:
        x: by what is counted, a place for each.
    """

    name: str
    x: Places
    y: tuple[float, ...]
    hue: int = 1


@dataclass(frozen=True)
class Mark:
    """A moment of the run.

    Args:
        x: by what is counted, its place.
    """

    kind: Literal["checkpoint", "restart", "event"]
    x: dict[str, float]
    text: str


@dataclass(frozen=True)
class Chart:
    """
    Args:
        key: of the chart on its page, a word.
        title: with the unit, such as ``Memory, GiB``.
        told: the most important values, for those who cannot see it too.
        ends: by what is counted, both ends of the horizontal axis.
        is_small: needs no more than half of the page.
        is_share: its values are shares, from 0 to 1.
    """

    key: str
    title: str
    told: str
    ends: dict[str, tuple[float, float]]
    lines: Sequence[Line] = ()
    dots: Sequence[Dots] = ()
    marks: Sequence[Mark] = field(default=())
    is_small: bool = False
    is_share: bool = False


def draw(chart: Chart) -> Markup:
    """The figure."""
    figures = _figures(chart)
    scales = [straight(figures, of_share=chart.is_share)]
    log = logarithmic(figures)
    scales += [] if log is None else [log]
    views: list[Markup] = []
    described: dict[str, dict[str, object]] = {}
    for counted, ends in chart.ends.items():
        across = straight(ends, whole=counted == "steps", tight=True)
        for up in scales:
            name = f"{counted} {'log' if up.is_log else 'linear'}"
            is_shown = not views
            views.append(_view(chart, counted, across, up, name=name, is_shown=is_shown))
            described[name] = {"x": [across.low, across.high], "y": [up.low, up.high], "log": up.is_log}
    switch = "" if log is None else _switch(chart.title)
    return Markup(
        '<figure class="chart{small}" id="chart-{key}"><figcaption><h3>{title}</h3>{switch}'
        '<p class="told quiet">{told}</p></figcaption>'
        '<div class="plot"><div class="area" tabindex="0" role="group" aria-label="{title}. {told} '
        'The arrow keys say the values.">{views}<i class="cursor" hidden></i><div class="readout" hidden></div>'
        "</div></div>{legend}"
        '<script type="application/json" class="values">{values}</script></figure>'
    ).format(
        small=" small" if chart.is_small else "", key=chart.key, title=chart.title, switch=switch, told=chart.told,
        views=Markup("").join(views), legend=_legend(chart), values=Markup(_values(chart, described)),
    )  # fmt: skip


def _figures(chart: Chart) -> list[float]:
    """Everything that the vertical axis has room for."""
    found: list[Value] = []
    for line in chart.lines:
        found += line.curve.smooth
        if line.shows_raw or not line.curve.smooth:
            found += [*line.curve.low, *line.curve.high]
    found += [y for dots in chart.dots for y in dots.y]
    return [figure for figure in found if figure is not None and math.isfinite(figure)]


def _switch(title: str) -> Markup:
    return Markup(
        '<span class="switch" role="group" aria-label="Scale of {title}" hidden>'
        '<button type="button" data-scale="linear" aria-pressed="true">linear</button>'
        '<button type="button" data-scale="log" aria-pressed="false">log</button></span>'
    ).format(title=title)


def _view(chart: Chart, counted: str, across: Axis, up: Axis, *, name: str, is_shown: bool) -> Markup:
    parts = []
    for mark in chart.marks:
        if mark.kind != "checkpoint" and counted in mark.x:
            parts.append(f'<path class="{mark.kind}" d="M{across.at(mark.x[counted]):.1f} 0V{SIZE}"/>')
    ticks = "".join(f"M{across.at(m.x[counted]):.1f} {SIZE}v-45" for m in chart.marks if _is_saved(m, counted))
    parts += [f'<path class="checkpoint" d="{ticks}"/>'] if ticks else []
    for line in chart.lines:
        parts += _line(line, counted, across, up)
    for dots in chart.dots:
        parts += _dots(dots, counted, across, up)
    grid = "".join(f"M0 {up.at(tick, upwards=True):.1f}H{SIZE}" for tick in up.ticks)
    beside = "".join(f'<span class="y" style="top:{100 - 100 * up.share(tick):.2f}%">{label}</span>'
                     for tick, label in zip(up.ticks, labels(up.ticks), strict=True))  # fmt: skip
    names = zip(across.ticks, labels(across.ticks), strict=True)
    below = "".join(f'<span class="x{_side(across.share(tick))}" style="left:{100 * across.share(tick):.2f}%">'
                    f"{label}</span>" for tick, label in names)  # fmt: skip
    return Markup(
        '<div class="view" data-view="{name}"{hidden}>'
        '<svg viewBox="0 0 {size} {size}" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="grid" d="{grid}"/>{parts}</svg>{beside}{below}<span class="name">{counted}</span></div>'
    ).format(
        name=name, hidden="" if is_shown else Markup(" hidden"), size=SIZE, grid=grid, parts=Markup("".join(parts)),
        beside=Markup(beside), below=Markup(below), counted=COUNTS[counted],
    )  # fmt: skip


def _is_saved(mark: Mark, counted: str) -> bool:
    return mark.kind == "checkpoint" and counted in mark.x


def _side(share: float) -> str:
    """A figure at the end of an axis stays within the page."""
    return " last" if share > 0.94 else ""


def _line(line: Line, counted: str, across: Axis, up: Axis) -> list[str]:
    curve, style = line.curve, f"h{line.hue % HUES}"
    x = curve.x[counted]
    parts = []
    if line.shows_raw or not curve.smooth:
        if not curve.is_exact:
            parts.append(f'<path class="band {style}" d="{_band(curve, x, across, up)}"/>')
        faint = " faint" if curve.smooth else ""
        parts.append(f'<path class="raw {style}{faint}" d="{_path(x, curve.mean, across, up)}"/>')
    if curve.smooth:
        parts.append(f'<path class="smooth {style}" d="{_path(x, curve.smooth, across, up)}"/>')
    broken = curve.broken[counted][:: max(1, len(curve.broken[counted]) // 200)]
    if broken:
        ticks = "".join(f"M{across.at(place):.1f} 0v60" for place in broken)
        parts.append(f'<path class="broken" d="{ticks}"/>')
    return parts


def _runs(x: Sequence[float], values: Sequence[Value], up: Axis) -> list[list[tuple[float, float]]]:
    """(x, value) without gaps, of those that the axis can show."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place, value in zip(x, values, strict=True):
        if value is not None and up.can_show(value):
            runs[-1].append((place, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _path(x: Sequence[float], values: Sequence[Value], across: Axis, up: Axis) -> str:
    parts = []
    for run in _runs(x, values, up):
        points = [f"{across.at(place):.1f} {up.at(value, upwards=True):.1f}" for place, value in run]
        # A line of no length has round ends: a dot.
        parts.append(f"M{points[0]}h0" if len(points) == 1 else "M" + "L".join(points))
    return "".join(parts)


def _band(curve: Curve, x: Sequence[float], across: Axis, up: Axis) -> str:
    """From the least to the largest value of each place."""
    low_of = dict(zip(x, curve.low, strict=True))
    parts = []
    for run in _runs(x, curve.high, up):
        highs = [f"{across.at(place):.1f} {up.at(value, upwards=True):.1f}" for place, value in run]
        lows = []
        for place, _ in reversed(run):
            low = low_of[place]
            y = up.at(low, upwards=True) if low is not None and up.can_show(low) else SIZE
            lows.append(f"{across.at(place):.1f} {y:.1f}")
        parts.append("M" + "L".join([*highs, *lows]) + "Z")
    return "".join(parts)


def _dots(dots: Dots, counted: str, across: Axis, up: Axis) -> list[str]:
    style, x = f"h{dots.hue % HUES}", dots.x[counted]
    known = [(place, y) for place, y in zip(x, dots.y, strict=True) if up.can_show(y)]
    spots = "".join(f"M{across.at(place):.1f} {up.at(y, upwards=True):.1f}h0" for place, y in known)
    joined = _path(x, dots.y, across, up)
    return [f'<path class="joined {style}" d="{joined}"/>', f'<path class="dot {style}" d="{spots}"/>']


def _legend(chart: Chart) -> Markup:
    said = [key for line in chart.lines for key in _keys(line)]
    said += [(f"dot h{dots.hue % HUES}", dots.name) for dots in chart.dots]
    if not chart.is_small:  # the large one beside it has told
        words = {"checkpoint": "checkpoint", "restart": "started again", "event": "event"}
        said += [(kind, word) for kind, word in words.items() if any(mark.kind == kind for mark in chart.marks)]
    elif len(said) == 1 or (len(chart.lines) == 1 and not chart.lines[0].curve.smooth):
        return Markup("")
    keys = Markup("").join(Markup('<span><i class="key {}"></i>{}</span>').format(style, word) for style, word in said)
    return Markup('<p class="legend">{}</p>').format(keys)


def _keys(line: Line) -> list[tuple[str, str]]:
    """(class, word) of each thing that is drawn of a line."""
    style, curve = f"h{line.hue % HUES}", line.curve
    if not line.shows_raw:
        return [(f"{'smooth' if curve.smooth else 'raw'} {style}", line.name)]
    said = [(f"smooth {style}", "smoothed")] if curve.smooth else []
    raw = f"raw {style} faint" if curve.smooth else f"raw {style}"
    if curve.is_exact:
        said.append((raw, "each step" if curve.smooth else line.name))
    else:
        said += [(raw, f"mean of {curve.of_steps:,} steps"), (f"band {style}", "least to largest")]
    return said + ([("broken", "not finite")] if any(curve.broken.values()) else [])


def _values(chart: Chart, views: dict[str, dict[str, object]]) -> str:
    """What the script reads; no text of it can end the element that it is in."""
    document = {
        "views": views,
        "counts": {counted: COUNTS[counted] for counted in chart.ends},
        "lines": [
            {
                "name": line.name, "hue": line.hue % HUES, "of": line.curve.of_steps, "raw": line.shows_raw,
                "x": {counted: _digits(line.curve.x[counted]) for counted in chart.ends},
                "mean": _digits(line.curve.mean), "smooth": _digits(line.curve.smooth),
            }
            | ({} if line.curve.is_exact else {"low": _digits(line.curve.low), "high": _digits(line.curve.high)})
            for line in chart.lines
        ],
        "dots": [
            {"name": dots.name, "hue": dots.hue % HUES, "x": {c: _digits(dots.x[c]) for c in chart.ends},
             "y": _digits(dots.y)}
            for dots in chart.dots
        ],
        "marks": [{"x": mark.x, "text": mark.text} for mark in chart.marks],
    }  # fmt: skip
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _digits(values: Sequence[Value]) -> list[Value]:
    """To seven digits that count."""
    return [float(f"{value:.7g}") if value is not None and math.isfinite(value) else None for value in values]
