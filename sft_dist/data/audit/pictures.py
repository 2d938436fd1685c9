"""Pictures of the HTML report, as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sft_dist.data.audit.catalogue import percent
from sft_dist.data.audit.findings import Histogram, SourceFigures

WIDTH = 1000
HISTOGRAM_WIDTH = 500
_LABEL_WIDTH = 220
_BAR_HEIGHT = 26
_PLOT_HEIGHT = 110
_MARGIN = 44

# Average width of a character at the labels' size; a full-width one takes two.
_CHARACTER = 6.6


def source_bars(sources: Sequence[SourceFigures]) -> str:
    """A bar a source: its tokens, the trained ones of them darker."""
    most = max((source.tokens for source in sources), default=0) or 1
    room = WIDTH - _LABEL_WIDTH - 220
    parts = []
    for number, source in enumerate(sources):
        y = number * _BAR_HEIGHT
        whole = room * source.tokens / most
        trained = room * source.supervised_tokens / most
        share = percent(source.supervised_tokens / source.tokens) if source.tokens else "-"
        parts.append(
            f'<text class="label" x="{_LABEL_WIDTH - 8}" y="{y + 17}" text-anchor="end">'
            f"{escape(shortened(source.source, _LABEL_WIDTH - 12))}<title>{escape(source.source)}</title></text>"
            f'<rect class="soft" x="{_LABEL_WIDTH}" y="{y + 5}" width="{whole:.1f}" height="16" rx="2"/>'
            f'<rect class="strong" x="{_LABEL_WIDTH}" y="{y + 5}" width="{trained:.1f}" height="16" rx="2"/>'
            f'<text class="value" x="{_LABEL_WIDTH + whole + 8:.1f}" y="{y + 17}">{source.tokens:,}'
            f" · {share} trained</text>"
        )
    return _svg(
        "".join(parts), WIDTH, len(sources) * _BAR_HEIGHT + 4, "Tokens of each source, and how many are trained"
    )


def length_histogram(source: SourceFigures, max_seq_len: int) -> str:
    """Rows by length, with a line at ``max_seq_len`` where the axis reaches it."""
    edges = source.lengths.edges
    # The last bin may hold a few very long rows; drawn to scale it would be all of the picture.
    regular = edges[1] - edges[0] if len(edges) > 1 else 1
    is_overflow = len(edges) > 2 and edges[-1] - edges[-2] > 2 * regular
    drawn = edges[:-1] if is_overflow else edges
    span = (drawn[-1] - drawn[0]) or 1
    room = HISTOGRAM_WIDTH - 2 * _MARGIN - (30 if is_overflow else 0)

    def x(tokens: float) -> float:
        return _MARGIN + room * (tokens - drawn[0]) / span

    parts = [_bars(source.lengths.counts[: len(drawn) - 1], [x(edge) for edge in drawn])]
    if is_overflow:
        parts.append(
            f'<text class="value" x="{HISTOGRAM_WIDTH - _MARGIN - 24}" y="{_PLOT_HEIGHT - 6}">'
            f"+{source.lengths.counts[-1]:,}<title>rows of more than {drawn[-1]:,} tokens</title></text>"
        )
    parts += [_axis_label(x(edge), f"{edge:,}") for edge in _ticks(drawn)]
    if max_seq_len <= drawn[-1]:
        place = x(max_seq_len)
        is_left = place < HISTOGRAM_WIDTH / 2
        label = f'x="{place + (5 if is_left else -5):.1f}" text-anchor="{"start" if is_left else "end"}"'
        parts.append(
            f'<line class="limit" x1="{place:.1f}" x2="{place:.1f}" y1="2" y2="{_PLOT_HEIGHT}"/>'
            f'<text class="limit-label" {label} y="11">max_seq_len {max_seq_len:,}</text>'
        )
    return _svg("".join(parts), HISTOGRAM_WIDTH, _PLOT_HEIGHT + 20, f"Rows of {source.source} by length in tokens")


def fill_histogram(histogram: Histogram) -> str:
    """Sequences by how full they are, in percent."""
    room = HISTOGRAM_WIDTH - 2 * _MARGIN
    places = [_MARGIN + room * edge / 100 for edge in histogram.edges]
    labels = "".join(_axis_label(_MARGIN + room * at / 100, f"{at} %") for at in (0, 25, 50, 75, 100))
    return _svg(
        _bars(histogram.counts, places) + labels, HISTOGRAM_WIDTH, _PLOT_HEIGHT + 20, "Packs by how full they are"
    )


def _bars(counts: Sequence[int], places: Sequence[float]) -> str:
    """Bars between ``places``, and the largest count beside the axis."""
    most = max(counts, default=0) or 1
    bars = [
        f'<rect class="strong" x="{left:.1f}" y="{_PLOT_HEIGHT - height:.1f}" width="{max(right - left - 1, 0.6):.1f}" '
        f'height="{height:.1f}"><title>{count:,}</title></rect>'
        for count, left, right in zip(counts, places, places[1:], strict=False)
        if (height := max(90 * count / most, 1.0 if count else 0.0))
    ]
    axis = (
        f'<line class="axis" x1="{_MARGIN}" x2="{HISTOGRAM_WIDTH - _MARGIN}" y1="{_PLOT_HEIGHT}" y2="{_PLOT_HEIGHT}"/>'
    )
    top = f'<text class="tick" x="{_MARGIN - 6}" y="{_PLOT_HEIGHT - 82}" text-anchor="end">{_short(most)}</text>'
    return "".join(bars) + axis + top


def _ticks(edges: Sequence[int]) -> list[int]:
    """Some five round numbers within the edges."""
    span = max(edges[-1] - edges[0], 1)
    step = next(size * 10**power for power in range(20) for size in (1, 2, 5) if span <= 6 * size * 10**power)
    return list(range(-(-edges[0] // step) * step, edges[-1] + 1, step))


def _axis_label(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{_PLOT_HEIGHT + 15}" text-anchor="middle">{escape(text)}</text>'


def _short(count: int) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= 10 * size:
            return f"{count / size:.0f}{unit}"
    return f"{count:,}"


def shortened(text: str, width: float) -> str:
    """The end of ``text`` that fits: of two paths the ends differ."""
    kept, room = "", width / _CHARACTER - 1
    for character in reversed(text):
        room -= 2 if character > "\u2e7f" else 1
        if room < 0:
            return "…" + kept
        kept = character + kept
    return kept


def _svg(content: str, width: int, height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )
