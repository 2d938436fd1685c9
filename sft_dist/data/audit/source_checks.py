"""Findings of the checks that count rows of a source, and of those for which the rest of the source is the measure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.audit.catalogue import CHECKS, finding, percent
from sft_dist.data.audit.collect import Collected
from sft_dist.data.audit.findings import Example, Finding
from sft_dist.data.audit.language import LANGUAGES
from sft_dist.data.audit.settings import AuditSettings

# A source with fewer answers has no usual form and no usual pair of languages.
MIN_ANSWERS = 20

# What fewer answers than these do is not usual in their source.
UNUSUAL_FORM = 0.1
UNUSUAL_LANGUAGE = 0.2

# From this share of one-word answers on a source is one of labels, where they are right.
LABELS = 0.5

FORMS = {"json": "JSON", "markdown": "Markdown", "text": "plain text"}


def source_findings(collected: Collected, settings: AuditSettings) -> Iterator[Finding]:
    """Of every source by itself, and of their weights."""
    for source, number in collected.columns.sources.items():
        mask = collected.columns.source == number
        yield from _row_findings(collected, source, mask, settings)
        yield from _odd_ones(collected, source, settings)
    yield from _dominance(collected, settings)


def _row_findings(
    collected: Collected, source: str, mask: NDArray[np.bool_], settings: AuditSettings
) -> Iterator[Finding]:
    total = int(mask.sum())
    for name in CHECKS:
        count = collected.defects.counts[source, name]
        if not count:
            continue
        check = "masked_source" if name == "no_supervised_token" and count == total else name
        examples = collected.defects.examples(source, name)
        yield finding(
            check, set=collected.name, source=source, count=count, total=total, limits=settings.config.max_share,
            examples=examples, detail=_detail(name, collected, mask, settings, examples),
        )  # fmt: skip


def _detail(
    name: str,
    collected: Collected,
    mask: NDArray[np.bool_],
    settings: AuditSettings,
    examples: list[Example],
) -> str:
    if name == "over_length":
        excess = collected.columns.tokens[mask] - settings.max_seq_len
        excess = excess[excess > 0]
        share = percent(int(excess.sum()) / max(1, int(collected.columns.tokens[mask].sum())))
        fate = {
            "error": "training refuses them",
            "drop": "they are dropped",
            "truncate": "they are cut",
            "split": "they are split",
        }
        return (
            f"over {settings.max_seq_len:,} by {int(np.median(excess)):,} tokens in the median, "
            f"{int(excess.max()):,} at most, {int(excess.sum()):,} ({share} of the source) in all; "
            f"{fate[settings.over_length]} (data.over_length: {settings.over_length})"
        )
    if name == "untrained_token":
        return "it is " + ", ".join(sorted({example.text.partition(":")[0] for example in examples}))
    return ""


def _odd_ones(collected: Collected, source: str, settings: AuditSettings) -> Iterator[Finding]:
    """Answers that are unlike the others of their source."""
    features, set = collected.features, collected.name
    limits = settings.config.max_share
    forms = features.of_source(source, "form/")
    answers = sum(forms.values())
    one_word = features.of_source(source, "one_word").get("", 0)
    if one_word:
        is_label = answers >= MIN_ANSWERS and one_word >= LABELS * answers
        yield finding(
            "short_answer", set=set, source=source, count=one_word, total=answers, limits=limits,
            examples=features.examples(source, "one_word"), severity="info" if is_label else None,
            detail="a source of labels" if is_label else "",
        )  # fmt: skip
    if answers < MIN_ANSWERS:
        return
    usual_form = max(forms, key=lambda form: forms[form])
    for form, count in forms.items():
        if count <= UNUSUAL_FORM * answers:
            # A list here and there is no fault; what a program shall parse is.
            is_parsed = "json" in (form, usual_form)
            yield finding(
                "inconsistent_format", set=set, source=source, count=count, total=answers, limits=limits,
                examples=features.examples(source, f"form/{form}"), severity=None if is_parsed else "info",
                detail=f"{FORMS[form]}, where most are {FORMS[usual_form]}",
            )  # fmt: skip
    languages = features.of_source(source, "language/")
    told = sum(languages.values())
    for pair, count in languages.items():
        asked, _, answered = pair.partition("/")
        if asked != answered and count <= UNUSUAL_LANGUAGE * told and told >= MIN_ANSWERS:
            yield finding(
                "language_mismatch", set=set, source=source, count=count, total=told, limits=limits,
                examples=features.examples(source, f"language/{pair}"),
                detail=f"asked in: {LANGUAGES[asked]}, answered in: {LANGUAGES[answered]}",
            )  # fmt: skip


def _dominance(collected: Collected, settings: AuditSettings) -> Iterator[Finding]:
    columns = collected.columns
    if len(columns.sources) < 2 or not columns.tokens.any():
        return
    tokens = np.bincount(columns.source, weights=columns.tokens).astype(np.int64)
    total = int(tokens.sum())
    for source, number in columns.sources.items():
        if tokens[number] >= settings.config.dominant_share * total:
            yield finding(
                "dominant_source", set=collected.name, source=source, count=int(tokens[number]), total=total,
                limits=settings.config.max_share,
            )  # fmt: skip
