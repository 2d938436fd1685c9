"""A warning when a run learns its training rows by heart: the held-out loss rises while that of training falls."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sft_dist.config.control_schema import EVAL_LOSS

# In the line of metrics of the warning.
WARNED = "overfitting"


@dataclass(frozen=True)
class _Evaluation:
    """
    Args:
        train_loss: mean of the steps since the evaluation before; None without any.
    """

    step: int
    loss: float
    train_loss: float | None


class OverfitWatch:
    """Of a whole run, on rank 0. It warns once.

    Args:
        rises: evaluations in a row whose loss has risen.
        lines: that ``metrics.jsonl`` has of the run so far.
    """

    def __init__(self, rises: int, lines: Iterable[str] = ()) -> None:
        self.rises = rises
        self._evaluations: list[_Evaluation] = []
        self._losses: list[float] = []
        self._has_warned = False
        for line in lines:
            self._read(json.loads(line))

    def _read(self, line: dict[str, Any]) -> None:
        if line.get("loss") is not None:
            self.trained(line["loss"])
        elif line.get(EVAL_LOSS) is not None:
            self._note(int(line["step"]), line[EVAL_LOSS])
        self._has_warned |= WARNED in line

    def trained(self, loss: float) -> None:
        self._losses.append(loss)

    def evaluated(self, step: int, loss: float) -> str | None:
        """What is to be told after this evaluation, in a line; None for nothing. One that is not finite is none."""
        if not math.isfinite(loss):
            return None
        self._note(step, loss)
        if self._has_warned or not self._is_overfitting():
            return None
        self._has_warned = True
        best, last = self.best, self._evaluations[-1]
        before = self._evaluations[-1 - self.rises]
        return (
            f"the run overfits: {EVAL_LOSS} has risen {self.rises} times in a row, {before.loss:.4f} to "
            f"{last.loss:.4f}, while the training loss fell from {before.train_loss:.4f} to {last.train_loss:.4f}. "
            f"The best evaluation is that of step {best.step:,} ({best.loss:.4f}): checkpoint.final best exports it "
            "where it is kept, early_stopping ends a run there; fewer epochs, a lower optim.lr or more data move it"
        )

    @property
    def best(self) -> _Evaluation:
        """The evaluation with the lowest loss, the first of equals."""
        return min(self._evaluations, key=lambda each: each.loss)

    def _note(self, step: int, loss: float) -> None:
        mean = statistics.fmean(self._losses) if self._losses else None
        self._losses.clear()
        self._evaluations.append(_Evaluation(step, loss, mean))

    def _is_overfitting(self) -> bool:
        recent = self._evaluations[-1 - self.rises :]
        if len(recent) <= self.rises:
            return False
        first, last = recent[0].train_loss, recent[-1].train_loss
        rises = all(later.loss > earlier.loss for earlier, later in itertools.pairwise(recent))
        return rises and first is not None and last is not None and last < first
