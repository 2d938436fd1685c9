"""What a run needs of a device, from what is kept of its model: the tapes of its longest micro-batches."""

from __future__ import annotations

from sft_dist.plan.cache import cached_trace
from sft_dist.plan.memory import memory_phases
from sft_dist.plan.result import Phase
from sft_dist.run import Run


def evaluates(run: Run) -> bool:
    """Whether there are rows that are held out."""
    return bool(run.data.eval) or run.data.eval_split is not None


def phases_of(run: Run) -> tuple[Phase, ...]:
    """Device memory of the rank that needs most, phase by phase."""
    return memory_phases(run, cached_trace(run), cached_trace(run, backward=False) if evaluates(run) else None)


def peak_of(run: Run) -> Phase:
    """The phase that takes most of a device, at its highest moment."""
    return max(phases_of(run), key=lambda phase: phase.total_bytes)


def needed_bytes(run: Run) -> int:
    """Most that is taken of a device in any phase, CUDA's context included."""
    return peak_of(run).total_bytes
