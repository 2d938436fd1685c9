"""Which losses are a spike or not a number, and what is to be done about them. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from sft_dist.checkpoint.manifest import Position
from sft_dist.config.spikes_schema import SpikesConfig

Kind = Literal["spike", "non_finite"]
Remedy = Literal["warn", "skip", "roll_back", "stop"]

MAX_IN_A_ROW, MAX_ROLL_BACKS = "spikes.max_in_a_row", "spikes.max_roll_backs"


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a step.

    Args:
        step: 1-based.
        grad_norm: None: not known.
        median: of the losses before it; None: there were too few.
        remedy: what is to be done, and ``why`` it is to stop where another remedy has been used up.
    """

    step: int
    kind: Kind
    loss: float
    grad_norm: float | None
    median: float | None
    remedy: Remedy
    why: str = ""

    @property
    def fix(self) -> str:
        """What a user can do where the run ends over it."""
        if not self.why:
            return (
                "look at these rows; lower optim.lr or set optim.max_grad_norm where they are good, or let the run go "
                "on without them: spikes.non_finite and spikes.policy"
            )
        limit = MAX_ROLL_BACKS if MAX_ROLL_BACKS in self.why else MAX_IN_A_ROW
        factor = "spikes.factor or " if self.kind == "spike" else ""
        return f"look at these rows; lower optim.lr, or raise {factor}{limit} where they are good"

    def __str__(self) -> str:
        said = f"loss {self.loss:.6g}"
        if self.kind == "spike":
            return f"{said} is a spike, {self.loss / (self.median or math.nan):.1f} times the median of the last ones"
        return said if self.grad_norm is None else f"{said}, gradient norm {self.grad_norm:.6g}"


class Spikes:
    """Judges the losses of a run, in their order. The same numbers give the same judgement on every rank.

    Args:
        position: where the run begins or goes on.
    """

    def __init__(self, rules: SpikesConfig, position: Position) -> None:
        self.rules = rules
        self.skipped, self.roll_backs = set(position.skipped_steps), position.roll_backs
        self._losses = deque(position.recent_losses, maxlen=rules.window)

    @property
    def waits(self) -> bool:
        """Whether the loss has to be known before a step's update."""
        return "skip" in (self.rules.policy, self.rules.non_finite)

    @property
    def may_go_back(self) -> bool:
        return "roll_back" in (self.rules.policy, self.rules.non_finite)

    def remembered(self) -> dict[str, Any]:
        """What a position keeps of it."""
        losses = () if self.rules.policy == "off" else tuple(self._losses)
        return {"skipped_steps": tuple(sorted(self.skipped)), "roll_backs": self.roll_backs, "recent_losses": losses}

    def admits(self, step: int, loss: float) -> bool:
        """Whether the update of a step with this loss may be made, as far as the loss tells."""
        trouble = self.trouble(step, loss, grad_norm=None)
        return trouble is None or trouble.remedy == "warn"

    def trouble(self, step: int, loss: float, grad_norm: float | None) -> Trouble | None:
        """What is wrong with a step, if anything is.

        Args:
            grad_norm: None: not known.
        """
        median = statistics.median(self._losses) if len(self._losses) >= (self.rules.window + 1) // 2 else None
        if not (math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))):
            kind: Kind = "non_finite"
            remedy: Remedy = self.rules.non_finite
        elif self.rules.policy != "off" and median is not None and loss > self.rules.factor * median:
            kind, remedy = "spike", self.rules.policy
        else:
            return None
        remedy, why = self._allowed(step, remedy)
        return Trouble(step, kind, loss, grad_norm, median, remedy, why)

    def _allowed(self, step: int, remedy: Remedy) -> tuple[Remedy, str]:
        if remedy in ("warn", "stop"):
            return remedy, ""
        in_a_row = next(n for n in range(step) if step - 1 - n not in self.skipped)
        if in_a_row >= self.rules.max_in_a_row:
            return "stop", f"the {in_a_row} steps before it were left out, too ({MAX_IN_A_ROW})"
        if remedy == "roll_back" and self.roll_backs >= self.rules.max_roll_backs:
            return "stop", f"the run has gone back {self.roll_backs} times already ({MAX_ROLL_BACKS})"
        return remedy, ""

    def leaves_out(self, step: int) -> bool:
        return step in self.skipped

    def trained(self, loss: float) -> None:
        """A step was, with this loss."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def leave_out(self, step: int) -> None:
        self.skipped.add(step)

    def went_back(self, position: Position) -> None:
        """The run is there again; what is left out stays so."""
        self.roll_backs += 1
        self._losses = deque(position.recent_losses, maxlen=self.rules.window)
