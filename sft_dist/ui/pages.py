"""How the pages are read from their templates, and what each of them has in common."""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus
from typing import Any

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

from sft_dist.pages.local_server import Answer
from sft_dist.pages.page import environment, only_these, style, text_of
from sft_dist.plan.units import duration
from sft_dist.report.charts import figure
from sft_dist.report.page import change, cut, lang

# Of a page that a command has written, in a frame or alone: it may show itself, and ask nobody for anything. Those
# without a script may be measured by the page around them; those with one get no share in what the key opens.
WRITTEN = (
    "sandbox allow-same-origin; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)


def with_charts() -> str:
    """The policy of a report: its script runs, apart from everything else here."""
    return f"sandbox allow-scripts; {only_these([_script('chart')])}; img-src data:; frame-ancestors 'self'"


def show(name: str, *, status: HTTPStatus = HTTPStatus.OK, **values: Any) -> Answer:
    """A whole page.

    Args:
        values: of its template.
    """
    scripts = [_script(each) for each in ("chart", "ui")]
    page = _templates().get_template(f"{name}.html.jinja").render(scripts=[Markup(each) for each in scripts], **values)
    return Answer(page, status=status, policy=only_these(scripts, own_server=True))


def part(name: str, **values: Any) -> str:
    """What a page replaces of itself."""
    return _templates().get_template(f"{name}.html.jinja").render(**values)


def _script(name: str) -> str:
    return text_of("sft_dist.report", "chart.js") if name == "chart" else text_of(__package__, "ui.js")


@lru_cache
def _templates() -> Environment:
    pages = environment()
    pages.loader = FunctionLoader(lambda name: text_of(__package__, name))
    pages.filters |= {
        "number": lambda value: f"{value:,}",
        "duration": duration,
        "change": change,
        "cut": cut,
        "score": figure,
        "lang": lang,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    pages.globals |= {
        "style": style(),
        "chart_style": Markup(text_of("sft_dist.report", "chart.css")),
        "own_style": Markup(text_of("sft_dist.report", "run.css") + text_of(__package__, "ui.css")),
    }
    return pages
