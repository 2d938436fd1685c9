"""An audit as one HTML page that needs nothing else: no script, no font, no address.

Texts of the data reach the page through Jinja's autoescape or ``html.escape`` only.
"""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Template
from markupsafe import Markup

from sft_dist.data.audit import pictures
from sft_dist.data.audit.catalogue import percent
from sft_dist.data.audit.findings import Audit, SetFigures
from sft_dist.data.audit.language import LANGUAGES
from sft_dist.data.audit.report_terminal import speed, split, verdict
from sft_dist.pages.page import environment as page_environment
from sft_dist.pages.page import template

# Sources with the most tokens; the table lists all.
MAX_PICTURES = 12

WORDS = {"error": "Error", "warning": "Warning", "info": "Note"}


def render(audit: Audit, *, title: str = "Data audit") -> str:
    """The page. ``title`` says what was audited."""
    return _template().render(
        title=title,
        audit=audit,
        verdict=verdict(audit),
        speed=speed(audit),
        sets=[_set(figures, audit) for figures in audit.figures],
        different=[(diff, *split(diff)) for diff in audit.render_diffs if diff.differs_at is not None],
        same=[diff for diff in audit.render_diffs if diff.differs_at is None],
        words=WORDS,
        languages=LANGUAGES,
    )


@lru_cache
def _template() -> Template:
    environment = page_environment()
    environment.filters["percent"] = percent
    environment.filters["visible"] = lambda text: text.replace("\n", "⏎\n")
    environment.filters["number"] = lambda value: f"{value:,}"
    return template(__package__, "report.html.jinja", environment)


def _set(figures: SetFigures, audit: Audit) -> dict[str, object]:
    """A set's figures with its pictures."""
    drawn = sorted(figures.sources, key=lambda source: -source.tokens)[:MAX_PICTURES]
    has_tokens = figures.tokens > 0
    return {
        "figures": figures,
        "bars": Markup(pictures.source_bars(drawn)) if has_tokens else None,
        "lengths": [(s.source, Markup(pictures.length_histogram(s, audit.max_seq_len))) for s in drawn if s.tokens],
        "not_drawn": len(figures.sources) - len(drawn),
        "fill": Markup(pictures.fill_histogram(figures.packs.fill_histogram)) if figures.packs else None,
    }
