"""What of a run its evaluations decide: when it stops early, and which of its states is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from sft_dist.config.section import Section

Mode = Literal["min", "max"]

EVAL_LOSS = "eval_loss"

# By name, or by what stands behind the last "/".
LOWER_IS_BETTER = ("eval_loss", "eval_perplexity", "eval_long_loss", "eval_long_perplexity")
HIGHER_IS_BETTER = (
    "accuracy", "bleu", "chrf", "exact_match", "json_schema", "json_valid", "macro_f1", "rouge1", "rouge2", "rougeL",
)  # fmt: skip

MODE = (
    "Whether a lower (min) or a higher (max) value is better; null: as the metric's name says; required for "
    "eval_scores/custom, whose name does not."
)


class EarlyStoppingConfig(Section):
    """Ends the run when its evaluations no longer improve; the learning rate keeps the schedule of all steps."""

    metric: str = Field(
        EVAL_LOSS,
        min_length=1,
        description="A key of an evaluation's line in metrics.jsonl: eval_loss, eval_perplexity, eval_loss/SOURCE, "
        "eval_scores/bleu.",
    )
    mode: Mode | None = Field(None, description=MODE)
    patience: int = Field(3, ge=1, description="Evaluations in a row without an improvement, after which the run ends.")
    threshold: float = Field(
        0.0, ge=0, description="Least difference to the best value that counts as an improvement, in the metric's unit."
    )


def best_of(metric: str | None, mode: Mode | None, stopping: EarlyStoppingConfig | None) -> tuple[str, Mode | None]:
    """What ``checkpoint.best_metric`` and ``best_mode`` are: as early stopping has it where they are null."""
    if stopping is None:
        return metric or EVAL_LOSS, mode
    if metric in (None, stopping.metric):
        return stopping.metric, mode or stopping.mode
    return metric or EVAL_LOSS, mode


@dataclass(frozen=True)
class Goal:
    """A metric, and which of two values of it is better."""

    metric: str
    mode: Mode

    def is_better(self, value: float, than: float | None, *, by: float = 0.0) -> bool:
        """Whether ``value`` improves on ``than`` by more than ``by``; any number improves on None, and what is not
        finite on nothing."""
        if not math.isfinite(value):
            return False
        if than is None:
            return True
        return value < than - by if self.mode == "min" else value > than + by

    def sortable(self, value: float) -> float:
        """Lower for a better value."""
        return value if self.mode == "min" else -value


def known_mode(metric: str) -> Mode | None:
    """What is better, by the name of a metric; None where that does not tell."""
    if metric in LOWER_IS_BETTER or metric.startswith(f"{EVAL_LOSS}/"):
        return "min"
    return "max" if metric.rpartition("/")[2].removeprefix("eval_") in HIGHER_IS_BETTER else None


def goal_of(metric: str, mode: Mode | None) -> Goal:
    """Of a validated configuration, in which one of the two says what is better."""
    better = mode or known_mode(metric)
    assert better is not None, "validate has asked for the mode"
    return Goal(metric, better)
