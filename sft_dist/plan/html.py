"""A dry run as one HTML page that needs nothing else: no script, no font, no address. Imports no torch.

Texts of the configuration reach the page through Jinja's autoescape or ``html.escape`` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from jinja2 import Template
from markupsafe import Markup

from sft_dist.pages.page import environment as page_environment
from sft_dist.pages.page import template
from sft_dist.plan import pictures, words
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.result import ParetoPoint, Plan, Range
from sft_dist.plan.units import (
    HOUR_S,
    duration,
    gib,
    percent,
    ranged,
    rate,
    step_seconds,
)

# Of the points of a search; the picture has all.
MAX_LISTED_POINTS = 40


def render(plan: Plan, *, points: Sequence[ParetoPoint] = ()) -> str:
    """The page.

    Args:
        points: what a search looked at; drawn by hours and dollars where there are any.
    """
    memory, time = plan.memory, plan.time
    whole_step = sum(time.step_parts.values()) or 1.0
    return _template().render(
        plan=plan,
        words=words,
        verdict_style=memory.verdict.replace(" ", "-"),
        bars=[(phase, Markup(pictures.memory_bar(phase, memory))) for phase in memory.phases],
        parts=[part for part in words.PARTS if any(phase.parts.get(part) for phase in memory.phases)],
        step_bar=Markup(pictures.step_bar(time)),
        step_parts=[
            (pictures.step_hue(number), name, seconds, seconds / whole_step)
            for number, (name, seconds) in enumerate(time.step_parts.items())
        ],
        pareto=Markup(pictures.pareto(points, jpy_per_usd=plan.cost.jpy_per_usd)) if points else None,
        listed=sorted(points, key=lambda point: (not point.on_front, not point.fits, point.usd))[:MAX_LISTED_POINTS],
        num_points=len(points),
    )


_UNITS = {"gib": gib, "duration": duration, "usd": format_usd, "jpy": format_jpy}


def _split_range(figure: Range, unit: str) -> tuple[str, str]:
    """``$390.26`` and ``($355.14-$441.00)``, to stand below each other; the second may be empty."""
    value, _, rest = ranged(figure, _UNITS[unit]).partition(" ")
    return value, rest


def _ends(figure: Range, unit: str) -> str:
    """``54.5 GiB to 57.9 GiB``; one of them where they read alike."""
    low, high = _UNITS[unit](figure.low), _UNITS[unit](figure.high)
    return low if low == high else f"{low} to {high}"


@lru_cache
def _template() -> Template:
    environment = page_environment()
    environment.filters |= {
        "gib": gib,
        "percent": percent,
        "rate": rate,
        "duration": duration,
        "ends": _ends,
        "hours": lambda hours: duration(hours * HOUR_S),
        "step": step_seconds,
        "usd": format_usd,
        "jpy": format_jpy,
        "split_range": _split_range,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
        "arguments": lambda overrides: " ".join(words.overrides(overrides)),
    }
    return template(__package__, "plan.html.jinja", environment)
