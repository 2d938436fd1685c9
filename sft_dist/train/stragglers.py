"""What each rank takes for its own part of a step, before it has to wait for others: its data and its forward passes.

Nothing is waited for to measure it: the forward is timed by the host on a CPU and by events on a GPU, which are read
when the step's numbers have arrived. Under ddp, zero1 and zero2 there is no collective in it. Under fsdp2 and zero3
weights are gathered there, and ranks that share sequences exchange parts of them: one slow rank makes the forward of
all of them long. The waiting cannot be told from the computing without waiting for the device, so there only the data
are compared, and a forward is told with what is in it.
"""

from __future__ import annotations

import socket
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from sft_dist.plan.units import step_seconds
from sft_dist.run import Run
from sft_dist.train.agreement import Agreement

# The ranks compare notes so often, in steps; without the first ones, which compile.
EVERY_STEPS, WARM_UP_STEPS = 50, 2

# A rank is slow that takes this many times the median for its own part, where that is this share of a step at least.
TIMES, SHARE = 1.5, 0.1

Mark = float | torch.cuda.Event


class Forwards:
    """Times the forward passes of training of a model, until ``close``."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._begun: Mark | None = None
        self._marks: list[tuple[Mark, Mark]] = []
        self._handles = [
            model.register_forward_pre_hook(lambda *_: self._begin()),
            model.register_forward_hook(lambda *_: self._end()),
        ]

    def take(self) -> list[tuple[Mark, Mark]]:
        """Begin and end of those since this was called last."""
        marks, self._marks = self._marks, []
        return marks

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _mark(self) -> Mark:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self) -> None:
        self._begun = self._mark() if torch.is_grad_enabled() else None

    def _end(self) -> None:
        if self._begun is not None:
            self._marks.append((self._begun, self._mark()))
            self._begun = None


def seconds(marks: Sequence[tuple[Mark, Mark]]) -> float:
    """Of forward passes that the device has done."""
    return sum(map(_between, marks))


def _between(marks: tuple[Mark, Mark]) -> float:
    begun, ended = marks
    if isinstance(begun, float) or isinstance(ended, float):
        return float(ended) - float(begun)  # type: ignore[arg-type]
    return 1e-3 * float(begun.elapsed_time(ended))


@dataclass(frozen=True)
class RankTimes:
    """A rank's steps in this session: means and 95th percentiles, in seconds a step.

    Args:
        data_wait_s: it waits for its own micro-batches; forward_s: its forward passes; step_s: wall time.
        forward_waits: the forward passes have waits for other ranks in them.
    """

    rank: int
    host: str
    steps: int
    data_wait_s: float
    data_wait_p95_s: float
    forward_s: float
    forward_p95_s: float
    step_s: float
    step_p95_s: float
    forward_waits: bool = field(default=False, kw_only=True)

    @property
    def own_s(self) -> float:
        """Of a step, what no other rank can make longer."""
        return self.data_wait_s if self.forward_waits else self.data_wait_s + self.forward_s


class Stragglers:
    """Of a session; every rank makes one and calls the same methods after the same steps.

    Args:
        forward_waits: as ``forward_waits`` finds it.
    """

    def __init__(self, rank: int, agreement: Agreement, *, forward_waits: bool) -> None:
        self._rank, self._agreement, self._host = rank, agreement, socket.gethostname()
        self._forward_waits = forward_waits
        self._data, self._forward, self._step = array("d"), array("d"), array("d")

    def add(self, *, data_wait_s: float, forward_s: float, step_s: float) -> None:
        """A step whose numbers are here."""
        self._data.append(data_wait_s)
        self._forward.append(forward_s)
        self._step.append(step_s)

    def compared(self, trained: int) -> str | None:
        """After every step: what is to be said of the last ones, if anything; a collective at some of them.

        Args:
            trained: steps of this session.
        """
        if trained % EVERY_STEPS:
            return None
        return slow(self._agreement.told(self._times(last=EVERY_STEPS - WARM_UP_STEPS)))

    def of_all(self) -> list[RankTimes]:
        """Of the whole session, by rank; a collective. Empty where no step was trained."""
        times = self._agreement.told(self._times(last=None))
        return times if all(each.steps for each in times) else []

    def _times(self, *, last: int | None) -> RankTimes:
        figures: list[float] = []
        for values in (self._data, self._forward, self._step):
            chosen = np.asarray(values[WARM_UP_STEPS:] or values)
            chosen = chosen if last is None else chosen[-last:]
            figures += [float(chosen.mean()), float(np.percentile(chosen, 95))] if len(chosen) else [0.0, 0.0]
        return RankTimes(self._rank, self._host, len(self._step), *figures, forward_waits=self._forward_waits)


def forward_waits(run: Run) -> bool:
    """Whether ranks wait for each other within a forward pass."""
    return run.strategy in ("fsdp2", "zero3") or run.batch.sequence_parallel > 1


def slow(times: Sequence[RankTimes]) -> str | None:
    """Names the ranks that keep the others waiting, with the times; None where there are none."""
    median_s = statistics.median(each.own_s for each in times)
    found = [
        each
        for each in sorted(times, key=lambda each: -each.own_s)
        if each.own_s > TIMES * median_s and each.own_s - median_s > SHARE * each.step_s
    ]
    if not found:
        return None
    first, more = found[0], f", and {len(found) - 1} more" if len(found) > 1 else ""
    if first.forward_waits:
        own = "for its data"
    else:
        own = f"for its data ({step_seconds(first.data_wait_s)}) and forward"
    return (
        f"slow: rank {first.rank} on {first.host} takes {step_seconds(first.own_s)} a step {own}, "
        f"the median rank {step_seconds(median_s)}{more}"
    )


def line_of(times: Sequence[RankTimes]) -> str:
    """A line about a session of several ranks: the slowest beside the median."""

    def extreme(what: str) -> str:
        largest = max(times, key=lambda each: getattr(each, what))
        most, median = getattr(largest, what), statistics.median(getattr(each, what) for each in times)
        return f"{step_seconds(most)} on rank {largest.rank} ({largest.host}), median {step_seconds(median)}"

    forward = "forward, with its waits for other ranks," if times[0].forward_waits else "forward"
    return f"ranks     a step waits for data at most {extreme('data_wait_s')}; {forward} at most {extreme('forward_s')}"


def of_ranks(times: Sequence[RankTimes]) -> dict[str, Any]:
    """The part of a receipt."""
    return {"ranks": [vars(each) for each in times]}
