"""Rows and packs as one HTML page that needs nothing else: no script, no font, no address.

Texts of the data reach the page through Jinja's autoescape only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

from jinja2 import Template

from sft_dist.data.show import Piece, Shown, ShownRow
from sft_dist.data.show_terminal import pack_line, row_line, totals_line
from sft_dist.data.token_text import alone, visible
from sft_dist.pages.page import environment as page_environment
from sft_dist.pages.page import template


def render(shown: Shown, *, tokens: bool = False) -> str:
    """The page. ``tokens``: with the borders of the tokens, and their ids below."""
    return _template().render(shown=shown, totals=totals_line(shown.totals), tokens=tokens)


@lru_cache
def _template() -> Template:
    environment = page_environment()
    environment.filters["visible"] = visible
    environment.filters["alone"] = alone
    environment.filters["row_line"] = row_line
    environment.filters["pack_line"] = pack_line
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["style"] = _style
    environment.filters["runs"] = _runs
    return template(__package__, "show.html.jinja", environment)


def _style(piece: Piece) -> str:
    """Classes of a piece."""
    return ("trained" if piece.is_supervised else "context") + (" special" if piece.is_special else "")


def _runs(row: ShownRow) -> Iterator[tuple[str, str]]:
    """(classes, text) of neighbouring pieces that look alike; a special token is always one by itself."""
    for (style, _), run in groupby(
        enumerate(row.pieces), key=lambda numbered: (_style(numbered[1]), numbered[0] if numbered[1].is_special else -1)
    ):
        yield style, "".join(piece.text for _, piece in run)
