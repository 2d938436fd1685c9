"""What evaluations decide while a run trains: the best state, an early end, a warning. The same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_dist.checkpoint.manifest import Position, Waiting
from sft_dist.config.control_schema import EVAL_LOSS
from sft_dist.config.measured import EVAL_PERPLEXITY, examined_metrics
from sft_dist.data.prepared import PreparedData
from sft_dist.metrics.logger import METRICS, RunLogger
from sft_dist.run import Run
from sft_dist.train.early_stopping import EarlyStopping, metric_of
from sft_dist.train.overfitting import WARNED, OverfitWatch
from sft_dist.train.step import evaluated_metrics

# The event of an evaluation that has figures which are not finite.
NON_FINITE = "non_finite_evaluation"


def require_metrics(run: Run, eval_data: PreparedData | None) -> None:
    """Refuses what an evaluation will not measure, before the model is built.

    Raises:
        ConfigError: the configuration names a metric that there will not be.
    """
    if eval_data is None:
        return
    names = dict.fromkeys([*evaluated_metrics(eval_data), *examined_metrics(run.eval)], 0.0)
    if run.early_stopping is not None:
        metric_of(names, run.early_stopping.metric, key="early_stopping.metric")
    if run.checkpoint.keep_best:
        metric_of(names, run.checkpoint.goal.metric, key="checkpoint.best_metric")


def _is_broken(name: str, value: float) -> bool:
    """Whether a value of an evaluation is one that nothing good explains; exp of a large loss may be infinite."""
    return not math.isfinite(value) and name != EVAL_PERPLEXITY


class Control:
    """Of one session. The loop tells it what happens and asks what follows.

    Args:
        logger: on rank 0; None elsewhere.
        best: of the checkpoints that are there, the best one's position; None without any that was evaluated.
        position: that the run goes on from; None at its beginning.
    """

    def __init__(self, run: Run, logger: RunLogger | None, best: Position | None, position: Position | None) -> None:
        self._rules, self._goal, self._logger = run.checkpoint, run.checkpoint.goal, logger
        self._best = None if best is None else best.value_of(self._goal.metric)
        self._evaluation: dict[str, float] = {}  # of the state as it is
        self._stopping = None
        if run.early_stopping is not None:
            self._stopping = EarlyStopping(run.early_stopping, None if position is None else position.waiting)
        self._watch = None
        if logger is not None and run.eval.warn_after_rises is not None:
            lines = (Path(run.output_dir) / METRICS).read_text(encoding="utf-8").splitlines()
            self._watch = OverfitWatch(run.eval.warn_after_rises, lines)

    @property
    def stops(self) -> bool:
        """Whether the run is to end here."""
        return self._stopping is not None and self._stopping.has_fired

    @property
    def is_best(self) -> bool:
        """Whether the state as it is is to be kept as the best one so far."""
        return self._rules.keep_best and self._is_better

    @property
    def _is_better(self) -> bool:
        value = self._evaluation.get(self._goal.metric)
        return value is not None and self._goal.is_better(value, self._best)

    @property
    def waiting(self) -> Waiting | None:
        """Of early stopping."""
        return None if self._stopping is None else self._stopping.waiting

    def trained(self) -> None:
        """A step has changed the state."""
        self._evaluation = {}

    def read(self, loss: float) -> None:
        """The loss of a step has arrived."""
        if self._watch is not None:
            self._watch.trained(loss)

    def would_stop(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the run is to end here once it is told of this evaluation; arguments and errors as ``evaluated``."""
        return self._stopping is not None and self._stopping.would_fire(step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The state after ``step`` has been evaluated, and its line is written.

        Raises:
            ConfigError: the evaluation has no metric of a name that the configuration gives.
        """
        self._evaluation = dict(metrics)
        if self._rules.keep_best:
            metric_of(metrics, self._goal.metric, key="checkpoint.best_metric")
        if self._stopping is not None:
            self._stopping.evaluated(step, metrics)
        if self._logger is None:
            return
        broken = [name for name, value in metrics.items() if _is_broken(name, value)]
        if broken:
            line = {"step": step, "event": NON_FINITE, "of_metrics": ", ".join(broken)}
            self._logger.event(line, self._told_of(step, broken))
        warning = None if self._watch is None else self._watch.evaluated(step, metrics[EVAL_LOSS])
        if self._watch is not None and warning is not None:
            line = {"step": step, "event": WARNED, WARNED: 1, "best_eval_step": self._watch.best.step}
            self._logger.event(line, warning)
        if self._stopping is not None and self._stopping.has_fired:
            line = {"step": step, "event": "early_stopping", **self._stopping.metrics()}
            self._logger.event(line, self._stopping.told(step))

    def _told_of(self, step: int, broken: Sequence[str]) -> str:
        follows = []
        if self._rules.keep_best and self._goal.metric in broken:
            follows.append("it is not the best state")
        if self._stopping is not None and self._stopping.config.metric in broken:
            follows.append("early stopping counts it as no improvement")
        told = f"evaluation at step {step:,}: {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} not finite"
        return told + "".join(f"; {each}" for each in follows)

    def saved(self) -> None:
        """The state as it is is on its way into a checkpoint."""
        if self._is_better:
            self._best = self._evaluation[self._goal.metric]

    def of_position(self) -> dict[str, Any]:
        """What the checkpoint of the state as it is tells of it."""
        finite = {name: value for name, value in self._evaluation.items() if math.isfinite(value)}
        loss = self._evaluation.get(EVAL_LOSS)
        others = {name: value for name, value in finite.items() if name != EVAL_LOSS}
        return {"eval_loss": loss, "evaluation": others, "waiting": self.waiting}
