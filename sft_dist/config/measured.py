"""What the evaluations of a configuration measure, and the files that they read."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config.control_schema import EVAL_LOSS
from sft_dist.config.eval_schema import EvalConfig

EVAL_PERPLEXITY = "eval_perplexity"

SCORES = "eval_scores/"


def score_key(name: str) -> str:
    """In ``metrics.jsonl``."""
    return f"{SCORES}{name}"


def examined_metrics(settings: EvalConfig) -> list[str]:
    """Names of what an evaluation measures of all sources together, beside the loss."""
    scores = [] if settings.scores is None else [score_key(name) for name in settings.scores.metrics]
    return scores + ([] if settings.long_texts is None else ["eval_long_loss", "eval_long_perplexity"])


def measured(settings: EvalConfig) -> list[str]:
    """Names of what an evaluation measures of all sources together."""
    return [EVAL_LOSS, EVAL_PERPLEXITY, *examined_metrics(settings)]


def may_measure(settings: EvalConfig, metric: str) -> bool:
    """Whether an evaluation may measure it, as far as that does not depend on the held-out rows and their sources."""
    return metric in measured(settings) or metric.startswith(f"{EVAL_LOSS}/")


def files_of_evaluations(settings: EvalConfig) -> Iterator[tuple[str, str]]:
    """Keys and files that the first evaluation will read; without long texts, which may be globs."""
    scores, samples = settings.scores, settings.samples
    if scores is not None and scores.json_schema is not None:
        yield "eval.scores.json_schema", scores.json_schema
    if scores is not None and scores.custom is not None:
        yield "eval.scores.custom", scores.custom.rpartition(":")[0]
    if samples is not None and samples.file is not None:
        yield "eval.samples.file", samples.file
