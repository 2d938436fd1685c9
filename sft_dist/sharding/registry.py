"""Which module describes and applies which strategy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sft_dist.model.build import SftModel
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding import ddp, fsdp2, zero
from sft_dist.sharding.activation_checkpointing import apply_activation_checkpointing
from sft_dist.sharding.spec import ShardingSpec
from sft_dist.sharding.strategy import Strategy

# Each says why its part of a run cannot do what another part asks for, or None.
DECLARATIONS: tuple[Callable[[Run], str | None], ...] = (
    lambda run: fsdp2.unsupported(run) if run.strategy == "fsdp2" else None,
    lambda run: zero.unsupported(run) if run.strategy in ZERO_STAGES else None,
)


def unsupported(run: Run) -> str | None:
    """Why the parts of a run do not go together, in a line; None where they do."""
    return next((reason for declared in DECLARATIONS if (reason := declared(run)) is not None), None)


def describe(run: Run, rank: int) -> ShardingSpec:
    """What ``rank`` holds under the run's strategy; pure, needs no process group."""
    match run.strategy:
        case "ddp":
            return ddp.describe(run, rank)
        case "fsdp2":
            return fsdp2.describe(run, rank)
        case _:
            return zero.describe(run, rank)


def apply(run: Run, model: SftModel, device: torch.device) -> Strategy:
    """Checkpointing, then sharding, then the optimizer over what sharding left; needs the process group."""
    apply_activation_checkpointing(model, run.activation_checkpointing)
    match run.strategy:
        case "ddp":
            return ddp.Ddp(run, model, device)
        case "fsdp2":
            return fsdp2.Fsdp2(run, model, device)
        case _:
            return zero.Zero(run, model, device)
