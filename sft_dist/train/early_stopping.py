"""When a run ends before its last step: its evaluations have stopped improving."""

from __future__ import annotations

from collections.abc import Mapping

from sft_dist.checkpoint.manifest import Waiting
from sft_dist.config.control_schema import EarlyStoppingConfig, goal_of
from sft_dist.errors import ConfigError


class EarlyStopping:
    """Counts evaluations without an improvement; every rank has one, and all see the same values.

    Args:
        waiting: where the run was that goes on; None at its beginning.
    """

    def __init__(self, config: EarlyStoppingConfig, waiting: Waiting | None) -> None:
        self.config, self.waiting = config, waiting or Waiting()
        self._goal = goal_of(config.metric, config.mode)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes note of an evaluation after ``step``.

        Raises:
            ConfigError: it has no such metric.
        """
        self.waiting = self._after(step, metrics)

    def would_fire(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the run is over once note is taken of that; arguments and errors as for ``evaluated``."""
        return has_fired(self.config, self._after(step, metrics))

    def _after(self, step: int, metrics: Mapping[str, float]) -> Waiting:
        value, threshold = metric_of(metrics, self.config.metric, key="early_stopping.metric"), self.config.threshold
        if self._goal.is_better(value, self.waiting.best, by=threshold):
            return Waiting(best=value, best_step=step)
        return self.waiting.model_copy(update={"evaluations": self.waiting.evaluations + 1})

    @property
    def has_fired(self) -> bool:
        return has_fired(self.config, self.waiting)

    def told(self, step: int) -> str:
        """Why the run ends after ``step``, in a line."""
        metric, best = self.config.metric, self.waiting
        least = f" by more than {self.config.threshold:g}" if self.config.threshold else ""
        since = "never was a number" if best.best is None else f"was {best.best:.4f} at step {best.best_step:,}"
        count = f"{best.evaluations} evaluation{'' if best.evaluations == 1 else 's'}"
        improved = f"{'has' if best.evaluations == 1 else 'have'} not improved it{least}"
        return f"stopped early at step {step:,}: {metric} {since}, and {count} since then {improved}"

    def metrics(self) -> dict[str, int | float]:
        """What ``metrics.jsonl`` and W&B get of it, beside the step."""
        best = self.waiting
        found: dict[str, int | float] = {"early_stopping/fired": 1, "early_stopping/evaluations": best.evaluations}
        if best.best is not None and best.best_step is not None:
            found |= {"early_stopping/best": best.best, "early_stopping/best_step": best.best_step}
        return found


def has_fired(config: EarlyStoppingConfig | None, waiting: Waiting | None) -> bool:
    """Whether a run with this behind it is over; by the patience of now, which may be another one than then."""
    return config is not None and waiting is not None and waiting.evaluations >= config.patience


def metric_of(metrics: Mapping[str, float], name: str, *, key: str) -> float:
    """
    Args:
        key: of the configuration that names the metric.

    Raises:
        ConfigError: an evaluation has no such metric.
    """
    if name not in metrics:
        raise ConfigError(
            f"{key} is {name}, which an evaluation of this run does not measure",
            fix=f"set {key} to one of: " + ", ".join(metrics),
        )
    return metrics[name]
