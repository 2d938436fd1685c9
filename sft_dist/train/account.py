"""The running account of a session: what its steps took, what it has cost, where its time went. Rank 0's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sft_dist.data.prepared import PreparedData
from sft_dist.metrics.logger import Metrics
from sft_dist.plan.bill import running_bill
from sft_dist.run import Run
from sft_dist.train.occupancy import Occupancy, occupancy
from sft_dist.train.outlook import Outlook
from sft_dist.train.sessions import Session, total_usd
from sft_dist.train.waste import Waste

# The first steps of a process compile, allocate and fill caches.
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class TrainedStep:
    """What the loop tells of a step.

    Args:
        number: 1-based; sequences, tokens: of all ranks.
        is_steady: whether its time is one of a step in a row of steps. One before which the host had waited for the
            device measures how fast the host hands out work.
    """

    number: int
    sequences: Sequence[int]
    tokens: int
    elapsed_s: float
    data_wait_s: float
    is_steady: bool


@dataclass(frozen=True)
class StepFigures:
    """Of the session's steady full steps.

    Args:
        steps: how many there were; step_s: their median.
        tokens_per_s: of all ranks, over all of them.
    """

    steps: int
    step_s: float
    tokens_per_s: float


class Account:
    """Of one session.

    Args:
        data: training data.
        earlier: sessions of the run before this one.
        session: this one, as it starts.
        started: on ``clock``, when its wall time began.
    """

    def __init__(
        self,
        run: Run,
        data: PreparedData,
        outlook: Outlook,
        *,
        earlier: tuple[Session, ...],
        session: Session,
        num_steps: int,
        started: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.run, self.data, self.outlook, self.num_steps = run, data, outlook, num_steps
        self._earlier = earlier
        self._session, self._started, self._clock = session, started, clock
        self._full_size = min(run.batch.global_batch_size, data.num_sequences)
        self._num_steps, self._data_wait_s = 0, 0.0
        self._steady: list[tuple[float, int]] = []
        self._occupancy = Occupancy()
        self._beside = {"evaluating": 0.0, "saving": 0.0}
        self._rehearsing_s = 0.0
        self._begun: float | None = None
        self._ended: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Wall time of this session until now."""
        return self._clock() - self._started

    @property
    def trained_s(self) -> float:
        """Wall time of all sessions of the run until now."""
        return sum(session.elapsed_s for session in self._earlier) + self.elapsed_s

    def rehearsed(self, seconds: float) -> None:
        """Before training begins."""
        self._rehearsing_s += seconds

    def begin_training(self) -> None:
        self._begun = self._clock()

    def end_training(self) -> None:
        self._ended = self._clock()

    def preempted(self, by: str) -> None:
        """The session ends here.

        Args:
            by: name of a signal.
        """
        self._session = replace(self._session, preempted_by=by)

    def evaluated(self, seconds: float) -> None:
        self._beside["evaluating"] += seconds

    def saved(self, seconds: float) -> None:
        self._beside["saving"] += seconds

    def trained(self, step: TrainedStep) -> tuple[Metrics, str]:
        """Books a step; what its line of metrics gets, and what is shown of the bill."""
        self._num_steps += 1
        self._data_wait_s += step.data_wait_s
        of_step = self.data.num_tokens[list(step.sequences)]
        self._occupancy += occupancy(of_step, self.run.batch, self.run.strategy)
        if step.is_steady and self._num_steps > WARM_UP_STEPS and len(step.sequences) == self._full_size:
            self._steady.append((step.elapsed_s, step.tokens))
        sessions = self.sessions()
        spent = total_usd(sessions) if self.outlook.price is not None else None
        metrics: Metrics = {"elapsed_s": sum(session.elapsed_s for session in sessions)}
        if spent is not None:
            metrics["cost_usd"] = spent
        return metrics | self._mfu(step), "" if spent is None else self._bill(step.number, spent)

    def _mfu(self, step: TrainedStep) -> Metrics:
        expected = self.outlook.expected
        if expected is None or expected.flops_per_token is None or expected.peak_flops_per_s is None:
            return {}
        per_device = step.tokens / step.elapsed_s / self.run.world.size
        return {"mfu": expected.flops_per_token * per_device / expected.peak_flops_per_s}

    def _bill(self, step: int, spent_usd: float) -> str:
        price = self.outlook.price
        assert price is not None
        assert self._begun is not None
        took_s = self._clock() - self._begun
        return running_bill(
            price,
            spent_usd=spent_usd,
            to_finish_s=took_s / self._num_steps * (self.num_steps - step),
            usd_per_million_tokens=price.usd_of(took_s) / self._occupancy.tokens * 1e6,
        )

    def sessions(self, *, ended: bool = False) -> tuple[Session, ...]:
        """All of the run, this one as it is now. One whose price nobody knew is billed at the price of this one."""
        price = self.outlook.price
        now = replace(self._session, elapsed_s=self.elapsed_s, ended=ended)
        if price is None:
            return (*self._earlier, now)
        return tuple(
            session if session.cost_usd is not None else replace(session, cost_usd=price.usd_of(session.elapsed_s))
            for session in (*self._earlier, now)
        )

    def figures(self) -> StepFigures | None:
        """None where the session had no steady full step."""
        if not self._steady:
            return None
        seconds = [took for took, _ in self._steady]
        return StepFigures(
            steps=len(seconds),
            step_s=statistics.median(seconds),
            tokens_per_s=sum(tokens for _, tokens in self._steady) / sum(seconds),
        )

    def waste(self) -> Waste:
        """Of the session, which has ended its training."""
        assert self._begun is not None
        assert self._ended is not None
        training_s = self._ended - self._begun - sum(self._beside.values())
        taken, run = self._occupancy, self.run
        is_packed = run.data.packing == "best_fit" and taken.sequences > 0
        return Waste(
            session_s=self.elapsed_s,
            starting_s=self._begun - self._started - self._rehearsing_s,
            rehearsing_s=self._rehearsing_s,
            evaluating_s=self._beside["evaluating"],
            saving_s=self._beside["saving"],
            finishing_s=self._clock() - self._ended,
            data_wait_s=self._data_wait_s,
            idle_s=training_s * taken.idle_share,
            uneven_s=training_s * taken.uneven_share,
            fill=taken.tokens / (taken.sequences * run.batch.max_seq_len) if is_packed else None,
        )
