"""What a run needs of a device, from what is kept of its model: the tapes of its longest micro-batches."""

from __future__ import annotations

from typing import Protocol

from sft_dist.plan.answers import answering, answers
from sft_dist.plan.cache import cached_trace
from sft_dist.plan.memory import memory_phases
from sft_dist.plan.result import Phase
from sft_dist.plan.tape import Tape
from sft_dist.run import Run


def evaluates(run: Run) -> bool:
    """Whether there are rows that are held out."""
    return bool(run.data.eval) or run.data.eval_split is not None


class Trace(Protocol):
    """``cached_trace``, or what keeps its answers."""

    def __call__(self, run: Run, *, backward: bool = True) -> Tape: ...


def eval_tapes(run: Run, trace: Trace) -> tuple[Tape | None, Tape | None]:
    """Of the longest evaluation batch, and of the longest prompts that are read together; None where there are none."""
    if not evaluates(run):
        return None, None
    return trace(run, backward=False), trace(answering(run), backward=False) if answers(run.eval) else None


def phases_of(run: Run) -> tuple[Phase, ...]:
    """Device memory of the rank that needs most, phase by phase."""
    return memory_phases(run, cached_trace(run), *eval_tapes(run, cached_trace))


def peak_of(run: Run) -> Phase:
    """The phase that takes most of a device, at its highest moment."""
    return max(phases_of(run), key=lambda phase: phase.total_bytes)


def needed_bytes(run: Run) -> int:
    """Most that is taken of a device in any phase, CUDA's context included."""
    return peak_of(run).total_bytes
