"""What is known of a run from its files, while it runs elsewhere or after it was killed. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.cluster.happened import Happened
from sft_dist.metrics.heartbeat import Beat


@dataclass(frozen=True)
class Pulse:
    """The heartbeat and its age.

    Args:
        dated: seconds since 1970, by the clock of the file system.
        age_s: since it was written.
        step_age_s: since this process completed a step, or began to train where it has not yet; None: it does neither.
        phase_age_s: since its phase began.
    """

    beat: Beat
    dated: float
    age_s: float
    step_age_s: float | None
    phase_age_s: float


@dataclass(frozen=True)
class Measured:
    """What ``metrics.jsonl`` has.

    Args:
        step: of its last line of training; loss, tokens_per_s, step_time_s: of that line.
        curve: losses from the first step to the last, each the mean of as many steps; None where none is finite.
        eval_last, eval_best: (step, loss).
        age_s: since the last line was written.
    """

    step: int
    loss: float | None
    tokens_per_s: float | None
    step_time_s: float | None
    mfu: float | None
    curve: tuple[float | None, ...]
    eval_last: tuple[int, float] | None
    eval_best: tuple[int, float] | None
    age_s: float


@dataclass(frozen=True)
class Bill:
    """
    Args:
        elapsed_s: wall time of all starts, as far as it is written down.
        spent_usd: None where no price is known.
        usd_per_hour: of all machines together.
        starts: how often the run has started to train.
    """

    elapsed_s: float
    starts: int
    spent_usd: float | None
    usd_per_hour: float | None
    jpy_per_usd: float | None
    price_name: str | None


@dataclass(frozen=True)
class Planned:
    """What ``plan.json`` says of the whole run; its cost is None where no price is known.

    Args:
        machines: that it was planned for, where the plan has a line about them.
    """

    machines: str | None
    step_s: float
    total_s: float
    usd: float | None
    jpy: float | None


@dataclass(frozen=True)
class Saved:
    """The checkpoints.

    Args:
        newest: step of the newest complete one whose manifest is whole; None: there is none.
        count: complete ones. writing: steps of those that are not complete.
    """

    newest: int | None
    age_s: float | None
    count: int
    writing: tuple[int, ...]


@dataclass(frozen=True)
class Evidence:
    """Everything that the files say.

    Args:
        finished: ``final/`` is there and the receipt says that the run is.
        final: proven, not proven (by the settings of the run), unfinished (it failed its proof, or is being written);
            None: there is none.
        num_steps: of the whole run.
        notes: what is not known and why, a line each.
        stopped_at: the step after which early stopping ended the run.
        happened: spikes, stalls and the like, the last of each kind.
    """

    pulse: Pulse | None
    measured: Measured | None
    bill: Bill | None
    planned: Planned | None
    saved: Saved
    finished: bool
    final: str | None
    num_steps: int | None
    notes: tuple[str, ...]
    stopped_at: int | None = None
    happened: tuple[Happened, ...] = ()
