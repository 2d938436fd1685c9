"""Cross-checks of ``data``: part of ``validate``. What is in the files is looked at elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sft_dist.config.schema import Config

Finding = tuple[str, str]  # as in ``validate``


def data_findings(config: Config) -> Iterator[Finding]:
    """Every contradiction."""
    yield from _mixing(config)
    yield from _supervision(config)
    yield from _packing(config)


def _mixing(config: Config) -> Iterator[Finding]:
    train, held_out = config.data.train, config.data.eval
    shares = [source.share for source in train if source.share is not None]
    if shares and len(shares) < len(train):
        yield (
            f"data.train: {len(shares)} of {len(train)} sources have a share",
            "give every training source a share, or all of them weights",
        )
    elif shares and not math.isclose(sum(shares), 1, abs_tol=1e-6):
        yield f"data.train: the shares add up to {sum(shares):g}", "make them add up to 1"
    for i, source in enumerate(train):
        if source.share is not None and source.weight != 1:
            yield f"data.train.{i} has a weight and a share", "remove one of them"
    for i, source in enumerate(held_out):
        if source.weight != 1 or source.share is not None:
            yield (
                f"data.eval.{i} has a weight or a share, which has no effect: held-out rows are seen once",
                "remove it",
            )
    if config.data.mix_by != "tokens" and not shares and all(source.weight % 1 == 0 for source in train):
        yield (
            f"data.mix_by is {config.data.mix_by}, which has no effect: no training source has a share or a fraction "
            "in its weight",
            "remove data.mix_by",
        )
    if config.data.eval_split is not None and held_out:
        yield "data.eval_split and data.eval both say what is held out", "remove one of them"


def _supervision(config: Config) -> Iterator[Finding]:
    data = config.data
    if data.train_on == "all" and not data.train_reasoning:
        yield "data.train_reasoning is false, but data.train_on all trains all text", "remove one of them"
    sources = {"train": data.train, "eval": data.eval}
    for place, template in (
        (f"data.{kind}.{i}.templates", template)
        for kind, listed in sources.items()
        for i, source in enumerate(listed)
        for template in source.templates
    ):
        if template.count("{prompt}") != 1:
            yield f"{place}: {template!r} has {{prompt}} {template.count('{prompt}')} times", "write it once"


def _packing(config: Config) -> Iterator[Finding]:
    if config.data.packing_window is not None and config.data.packing == "none":
        yield (
            f"data.packing_window is {config.data.packing_window}, which has no effect with data.packing none",
            "remove data.packing_window, or set data.packing to best_fit",
        )
