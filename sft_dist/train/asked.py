"""What a command asks of a run beside its configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# ``--resume``: begin; or go on from the newest checkpoint where there is one.
NEVER, AUTO = "never", "auto"

# Whether a run is rehearsed: not, before it, or without it.
Rehearsing = Literal["no", "first", "only"]


@dataclass(frozen=True)
class Asked:
    """
    Args:
        resume: ``never``, ``auto`` or the path of a checkpoint.
        allowed: names of the identity (``checkpoint/identity.py``) in which the checkpoint may differ.
        profiled_steps: to be traced.
        before: called on rank 0 when the processes have met, before anything is looked at or written; what it raises
            ends the run on all of them.
        on_news: called on rank 0 when the run directory has more to be looked at: when training begins, and after each
            evaluation.
        on_identity: called on every rank with what the run is (``receipt.identity_values``), before the model is built;
            what it raises on all of them ends the run.
    """

    resume: str = NEVER
    allowed: Collection[str] = ()
    rehearsing: Rehearsing = "no"
    profiled_steps: int = 0
    before: Callable[[], None] = lambda: None
    on_news: Callable[[], None] = lambda: None
    on_identity: Callable[[Mapping[str, Any]], None] = lambda _: None


# A run of its configuration alone.
ALONE = Asked()
