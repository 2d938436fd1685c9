"""The figures of a set from what was kept of its rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.audit.collect import Collected
from sft_dist.data.audit.findings import Cluster, Histogram, PackFigures, SetFigures, SourceFigures
from sft_dist.data.audit.language import LANGUAGES
from sft_dist.data.audit.settings import PackUse

LENGTH_BINS = 40
FILL_BINS = 20
TOP_PREFIXES = 10


def set_figures(
    collected: Collected,
    *,
    max_seq_len: int,
    packs: PackUse | None,
    num_clusters: int | None,
    clusters: tuple[Cluster, ...],
) -> SetFigures:
    """Everything that is counted of a set."""
    columns = collected.columns
    prompts = columns.hashes("prompt")
    edges = length_edges(columns.tokens, max_seq_len)
    return SetFigures(
        set=collected.name,
        rows=len(columns),
        tokens=int(columns.tokens.sum()),
        supervised_tokens=int(columns.supervised.sum()),
        sources=tuple(
            _source_figures(collected, source, columns.source == number, edges)
            for source, number in columns.sources.items()
        ),
        distinct_prompts=len(np.unique(prompts[prompts != 0])),
        prompt_prefixes=collected.prompt_prefixes.top(TOP_PREFIXES),
        answer_prefixes=collected.answer_prefixes.top(TOP_PREFIXES),
        distinct_n=collected.sample.distinct_n(),
        question_languages=_languages(collected, "question"),
        answer_languages=_languages(collected, "answer"),
        packs=None if packs is None else pack_figures(packs, len(columns), int(columns.tokens.sum())),
        num_clusters=num_clusters,
        clusters=clusters,
    )


def length_edges(tokens: NDArray[np.int64], max_seq_len: int) -> NDArray[np.int64]:
    """Bins of one width, from 0 to what all rows but the longest of a thousand have, so that outliers hide nothing.

    ``max_seq_len`` is one of the edges where a row exceeds it.
    """
    longest = int(tokens.max(initial=1))
    usual = max(int(np.quantile(tokens, 0.999)) if len(tokens) else 1, 1)
    if longest > max_seq_len:
        usual = max(usual, max_seq_len)
        width = -(-max_seq_len // max(1, LENGTH_BINS * max_seq_len // usual))
    else:
        width = -(-(usual + 1) // LENGTH_BINS)
    edges = np.arange(0, usual + width + 1, width)
    if longest >= edges[-1]:
        edges = np.append(edges, longest + 1)
    return edges


def _source_figures(
    collected: Collected, source: str, mask: NDArray[np.bool_], edges: NDArray[np.int64]
) -> SourceFigures:
    tokens = collected.columns.tokens[mask]
    counts, _ = np.histogram(tokens, edges)
    return SourceFigures(
        source=source,
        rows=int(mask.sum()),
        tokens=int(tokens.sum()),
        supervised_tokens=int(collected.columns.supervised[mask].sum()),
        lengths=Histogram(tuple(edges.tolist()), tuple(counts.tolist())),
        longest=int(tokens.max(initial=0)),
    )


def _languages(collected: Collected, part: str) -> dict[str, int]:
    counts = collected.languages.of_source(part, "")
    return {name: counts[name] for name in LANGUAGES if name in counts}


def pack_figures(packs: PackUse, rows: int, tokens: int) -> PackFigures:
    """How full sequences are.

    Args:
        rows, tokens: of the set, before anything is cut.
    """
    percents = 100 * packs.num_tokens / packs.capacity
    edges = np.linspace(0, 100, FILL_BINS + 1).astype(np.int64)
    counts, _ = np.histogram(percents, edges)
    return PackFigures(
        sequences=len(packs.num_tokens),
        capacity=packs.capacity,
        fill=float(packs.num_tokens.sum() / max(1, len(packs.num_tokens) * packs.capacity)),
        fill_histogram=Histogram(tuple(edges.tolist()), tuple(counts.tolist())),
        padding_if_unpacked=max(0.0, 1 - tokens / max(1, rows * packs.capacity)),
    )
