"""Audits prepared data: in full, with the texts of its rows, or by its token stores alone.

The stores know of every row its length, what of it is trained, its last trained token, and hashes of its prompt and of
its tokens. That is enough for the checks that find a worthless run, over ten million rows in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.audit.audit import EVAL, TRAIN, sorted_findings
from sft_dist.data.audit.catalogue import finding
from sft_dist.data.audit.figures import length_edges, pack_figures
from sft_dist.data.audit.findings import Audit, Example, Finding, Histogram, SetFigures, SourceFigures
from sft_dist.data.audit.rows import AuditedRow, shown
from sft_dist.data.audit.samples import MAX_EXAMPLES
from sft_dist.data.audit.settings import AuditSettings, PackUse
from sft_dist.data.chat_template import TokenizedRow
from sft_dist.data.selection import NamedStore
from sft_dist.data.sources import read_raw
from sft_dist.data.token_store import RowRecords, TokenStore
from sft_dist.data.tokenising import Work

# Tokens.
SEARCHED_AT_ONCE = 1 << 24

# Of a row that is shown.
SHOWN_TOKENS = 60

# Records that are turned into Python's objects at a time.
BATCH_ROWS = 8192


@dataclass(frozen=True)
class StoredSource:
    """One source of a set.

    Args:
        work: that made the store.
        is_in_set: [rows of the store] which rows the set has; None: all.
    """

    named: NamedStore
    work: Work
    is_in_set: NDArray[np.bool_] | None

    @property
    def store(self) -> TokenStore:
        return self.named.store

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Of the rows that the set has, in the store."""
        return np.arange(len(self.store.rows)) if self.is_in_set is None else np.flatnonzero(self.is_in_set)


def audited_rows(source: StoredSource) -> Iterator[AuditedRow]:
    """The rows of a source with their texts, read again, and their tokens, from the store.

    A row that was split has the tokens of all its parts; one that was rejected is left out.
    """
    store = source.store
    wanted = _by_row(source)
    place, numbers = next(wanted, (None, []))
    for file, path in enumerate(source.work.files):
        for raw, origin in read_raw(path, documents=source.work.parser.documents):
            if (file, origin.row) != place:
                continue
            ids = np.concatenate([_tokens(store, start, length)[0] for start, length in numbers])
            masks = np.concatenate([_tokens(store, start, length)[1] for start, length in numbers])
            tokens = TokenizedRow(ids.tolist(), masks.astype(bool).tolist())
            yield AuditedRow(source.named.name, source.work.parser.parse(raw, origin), tokens)
            place, numbers = next(wanted, (None, []))


def _by_row(source: StoredSource) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """(file, row) and the (start, length) of its parts, for each row that the set has."""
    starts, rows, numbers = source.store.starts, source.store.rows, source.numbers

    def records() -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        for first in range(0, len(numbers), BATCH_ROWS):
            batch = numbers[first : first + BATCH_ROWS]
            some = rows[batch]
            columns = (some["file"], some["number"], starts[batch], some["length"])
            for file, number, start, length in zip(*(column.tolist() for column in columns), strict=True):
                yield (file, number), (start, length)

    for place, parts in groupby(records(), key=lambda record: record[0]):
        yield place, [part for _, part in parts]


def _tokens(store: TokenStore, start: int, length: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    return store.input_ids[start : start + length], store.supervised[start : start + length]


def rejected_rows(sources: Sequence[StoredSource], set: str, settings: AuditSettings) -> Iterator[Finding]:
    """Rows that are in no store."""
    for source in sources:
        meta = source.store.meta
        count = meta["counts"].get("rejected_rows", 0)
        if count:
            yield finding(
                "rejected_row", set=set, source=source.named.name, count=count, total=count + len(source.store.rows),
                limits=settings.config.max_share,
                examples=[Example("", message) for message in meta["rejected"][:MAX_EXAMPLES]],
            )  # fmt: skip


def audit_stores(
    train: Sequence[StoredSource],
    eval: Sequence[StoredSource],
    *,
    settings: AuditSettings,
    packs: dict[str, PackUse],
    decode: Callable[[list[int]], str],
) -> Audit:
    """What can be told without reading the sources again.

    Args:
        decode: text of token ids, for examples.
    """
    started = time.monotonic()
    findings: list[Finding] = []
    figures = []
    for name, sources in ((TRAIN, train), (EVAL, eval)):
        if sources:
            columns = [_Columns(source, settings, decode) for source in sources]
            findings += [found for each in columns for found in each.findings(name)]
            findings += rejected_rows(sources, name, settings)
            figures.append(_figures(name, columns, settings, packs.get(name)))
            if name == EVAL:
                trained = np.concatenate([source.store.rows["prompt"][source.numbers] for source in train])
                findings += [found for each in columns for found in each.leaks(trained)]
    return Audit(
        findings=sorted_findings(findings),
        figures=tuple(figures),
        render_diffs=(),
        max_seq_len=settings.max_seq_len,
        is_cheap=True,
        seconds=time.monotonic() - started,
    )


class _Columns:
    """The rows of one source that a set has, column by column."""

    def __init__(self, source: StoredSource, settings: AuditSettings, decode: Callable[[list[int]], str]) -> None:
        self.source, self.settings, self.decode = source, settings, decode
        self.rows: RowRecords = source.store.rows[source.numbers]
        self.starts = source.store.starts[source.numbers]
        self.lengths = self.rows["length"].astype(np.int64)

    def findings(self, set: str) -> Iterator[Finding]:
        rows, settings = self.rows, self.settings
        is_masked = rows["supervised"] == 0
        yield from self._found("masked_source" if is_masked.all() else "no_supervised_token", set, is_masked)
        has_context = rows["supervised"] < rows["length"] - 1
        if settings.end_ids:
            ends = np.isin(rows["last"], list(settings.end_ids))
            yield from self._found("unsupervised_end", set, ~ends & ~is_masked & has_context)
        if settings.bos_id is not None:
            ids, long_enough = self.source.store.input_ids, rows["length"] > 1
            second = np.minimum(self.starts + 1, max(len(ids) - 1, 0))
            is_doubled = (ids[self.starts] == settings.bos_id) & (ids[second] == settings.bos_id) & long_enough
            yield from self._found("double_bos", set, is_doubled)
        if settings.untrained:
            yield from self._found("untrained_token", set, self._train_any_of(list(settings.untrained)))
        yield from self._found("over_length", set, self.lengths > settings.max_seq_len)
        is_later = np.ones(len(rows), bool)
        is_later[np.unique(rows["content"], return_index=True)[1]] = False
        yield from self._found("exact_duplicate", set, is_later)

    def _train_any_of(self, ids: list[int]) -> NDArray[np.bool_]:
        """[rows] whether a token of a row with one of ``ids`` is trained."""
        store, does = self.source.store, np.zeros(len(self.rows), bool)
        ends = self.starts + self.lengths
        for first in range(0, len(store.input_ids), SEARCHED_AT_ONCE):
            part = slice(first, first + SEARCHED_AT_ONCE)
            found = np.flatnonzero(np.isin(store.input_ids[part], ids) & (store.supervised[part] == 1)) + first
            rows = np.searchsorted(self.starts, found, side="right") - 1
            is_inside = (rows >= 0) & (found < ends[rows]) & (found > self.starts[rows])  # a row's first is not trained
            does[rows[is_inside]] = True
        return does

    def leaks(self, trained: NDArray[np.uint64]) -> Iterator[Finding]:
        """Held-out rows whose prompt is among those trained."""
        yield from self._found("leak_exact", EVAL, np.isin(self.rows["prompt"], trained))

    def _found(self, check: str, set: str, is_it: NDArray[np.bool_]) -> Iterator[Finding]:
        numbers = np.flatnonzero(is_it)
        if len(numbers):
            yield finding(
                check, set=set, source=self.source.named.name, count=len(numbers), total=len(self.rows),
                limits=self.settings.config.max_share,
                examples=[self._example(int(number)) for number in numbers[:MAX_EXAMPLES]],
            )  # fmt: skip

    def _example(self, number: int) -> Example:
        ids, _ = _tokens(self.source.store, int(self.starts[number]), min(int(self.lengths[number]), SHOWN_TOKENS))
        return Example(self.source.store.origin(int(self.source.numbers[number])), shown(self.decode(ids.tolist())))


def _figures(name: str, columns: Sequence[_Columns], settings: AuditSettings, packs: PackUse | None) -> SetFigures:
    lengths = np.concatenate([each.lengths for each in columns])
    edges = length_edges(lengths, settings.max_seq_len)
    sources = tuple(
        SourceFigures(
            source=each.source.named.name,
            rows=len(each.rows),
            tokens=int(each.lengths.sum()),
            supervised_tokens=int(each.rows["supervised"].sum(dtype=np.int64)),
            lengths=Histogram(tuple(edges.tolist()), tuple(np.histogram(each.lengths, edges)[0].tolist())),
            longest=int(each.lengths.max(initial=0)),
        )
        for each in columns
    )
    prompts = np.concatenate([each.rows["prompt"] for each in columns])
    return SetFigures(
        set=name,
        rows=len(lengths),
        tokens=int(lengths.sum()),
        supervised_tokens=sum(source.supervised_tokens for source in sources),
        sources=sources,
        distinct_prompts=len(np.unique(prompts)),
        prompt_prefixes=(),
        answer_prefixes=(),
        distinct_n={},
        question_languages={},
        answer_languages={},
        packs=None if packs is None else pack_figures(packs, len(lengths), int(lengths.sum())),
        num_clusters=None,
        clusters=(),
    )
