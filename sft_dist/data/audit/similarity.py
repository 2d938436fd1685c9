"""Findings that compare rows with each other: duplicates, contradictions, leaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.audit.catalogue import finding
from sft_dist.data.audit.collect import Collected
from sft_dist.data.audit.columns import Columns
from sft_dist.data.audit.findings import Cluster, Example, Finding
from sft_dist.data.audit.held_out import HeldOut
from sft_dist.data.audit.neighbours import clusters
from sft_dist.data.audit.samples import MAX_EXAMPLES
from sft_dist.data.audit.settings import AuditSettings

MAX_CLUSTERS = 20


def exact_duplicates(collected: Collected, settings: AuditSettings) -> Iterator[Finding]:
    """Rows that are the same as an earlier one, by their own source."""
    first = _first_of(collected.columns.hashes("whole"))
    again = np.flatnonzero(first != np.arange(len(first)))
    yield from _by_source(collected, "exact_duplicate", again, first, settings)


def near_duplicates(
    collected: Collected, settings: AuditSettings
) -> tuple[list[Finding], int | None, tuple[Cluster, ...]]:
    """Findings, number of clusters, and the largest ones; exact copies are left out of all three."""
    columns, signatures = collected.columns, collected.contents
    if signatures is None:
        return [], None, ()
    is_first = _first_of(columns.hashes("whole")) == np.arange(len(columns))
    first = clusters(len(columns), signatures.similar_pairs(is_first & columns.has_text))
    again = np.flatnonzero(first != np.arange(len(first)))
    heads, sizes = np.unique(first[again], return_counts=True)
    shown = []
    for place in np.argsort(-sizes, kind="stable")[:MAX_CLUSTERS]:
        members = [int(heads[place]), *again[first[again] == heads[place]][: MAX_EXAMPLES - 1].tolist()]
        shown.append(Cluster(int(sizes[place]) + 1, tuple(columns.example(row) for row in members)))
    detail = ""
    if len(heads):
        groups = "1 group" if len(heads) == 1 else f"{len(heads):,} groups"
        detail = f"{groups} in {collected.name}, the largest of {int(sizes.max()) + 1:,}"
    found = _by_source(collected, "near_duplicate", again, first, settings, detail=detail)
    return list(found), len(heads), tuple(shown)


def contradictions(collected: Collected, settings: AuditSettings) -> Iterator[Finding]:
    """Rows of which another one has the same text before the answer, system prompt included, and another answer."""
    columns = collected.columns
    contexts, answers = columns.hashes("context"), columns.hashes("answer")
    rows = np.flatnonzero(contexts != 0)
    if not len(rows):
        return
    pairs = np.unique(np.stack([contexts[rows], answers[rows]], axis=1), axis=0)
    values, counts = np.unique(pairs[:, 0], return_counts=True)
    several = values[counts > 1]
    concerned = rows[np.isin(contexts[rows], several)]
    if not len(concerned):
        return
    # The rows of a prompt beside each other, so that examples show what differs.
    concerned = concerned[np.argsort(contexts[concerned], kind="stable")]
    opposed = _opposed(contexts[concerned], columns.verdict[concerned])
    detail = f"{'1 prompt' if len(several) == 1 else f'{len(several):,} prompts'} in {collected.name}"
    if opposed:
        detail += f", {opposed:,} of which are answered both with yes and with no"
    for source, chosen in _each_source(columns, concerned):
        yield finding(
            "contradiction", set=collected.name, source=source, count=len(chosen),
            total=int(columns.rows_by_source[columns.sources[source]]), limits=settings.config.max_share,
            examples=[columns.example(row) for row in chosen[:MAX_EXAMPLES].tolist()], detail=detail,
        )  # fmt: skip


def leaks(evaluation: Collected, train: Collected, held_out: HeldOut, settings: AuditSettings) -> Iterator[Finding]:
    """Held-out rows that are trained on, by their source."""
    columns = evaluation.columns
    for name, is_exact in (("leak_exact", True), ("leak_near", False)):
        rows = np.array(sorted(row for row, leak in held_out.leaks.items() if leak.is_exact == is_exact), np.int64)
        for source, chosen in _each_source(columns, rows):
            examples = []
            for row in chosen[:MAX_EXAMPLES].tolist():
                leak = held_out.leaks[row]
                like = train.columns.origin(leak.train_row)
                examples.append(columns.example(row, like=like if is_exact else f"{like}, {leak.similarity:.2f}"))
            yield finding(
                name, set=evaluation.name, source=source, count=len(chosen),
                total=int(columns.rows_by_source[columns.sources[source]]), limits=settings.config.max_share,
                examples=examples,
            )  # fmt: skip


def _by_source(
    collected: Collected,
    check: str,
    again: NDArray[np.int64],
    first: NDArray[np.int64],
    settings: AuditSettings,
    *,
    detail: str = "",
) -> Iterator[Finding]:
    columns = collected.columns
    for source, chosen in _each_source(columns, again):
        examples: Sequence[Example] = [
            columns.example(row, like=columns.origin(int(first[row]))) for row in chosen[:MAX_EXAMPLES].tolist()
        ]
        yield finding(
            check, set=collected.name, source=source, count=len(chosen),
            total=int(columns.rows_by_source[columns.sources[source]]), limits=settings.config.max_share,
            examples=examples, detail=detail,
        )  # fmt: skip


def _each_source(columns: Columns, rows: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Those of ``rows`` that are of each source, where there are any."""
    for source, number in columns.sources.items():
        chosen = rows[columns.source[rows] == number]
        if len(chosen):
            yield source, chosen


def _first_of(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[rows] the first row with the same hash."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def _opposed(contexts: NDArray[np.uint64], verdicts: NDArray[np.int8]) -> int:
    """Contexts that are answered both with yes and with no."""
    return len(np.intersect1d(contexts[verdicts > 0], contexts[verdicts < 0]))
