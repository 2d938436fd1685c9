"""Which module describes and applies which strategy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sft_dist.model.build import TORCH_DTYPES, SftModel, build_model
from sft_dist.model.compiled import compile_fused
from sft_dist.model.cpu_shapes import multiple_for, split_products
from sft_dist.model.weights import Weights
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding import ddp, fsdp2, rotary, sequence_parallel, virtual_tokens, zero, zero_engine
from sft_dist.sharding.activation_checkpointing import apply_activation_checkpointing
from sft_dist.sharding.refusal import Refusal
from sft_dist.sharding.remember import for_alike_runs
from sft_dist.sharding.spec import ShardingSpec
from sft_dist.sharding.strategy import Strategy

# Each says why its part of a run cannot do what another part asks for, or None.
DECLARATIONS: tuple[Callable[[Run], Refusal | None], ...] = (
    lambda run: fsdp2.unsupported(run) if run.strategy == "fsdp2" else None,
    lambda run: zero_engine.unsupported(run) if run.strategy in ZERO_STAGES else None,
    rotary.unsupported,
    sequence_parallel.unsupported,
    virtual_tokens.unsupported,
)


def unsupported(run: Run) -> Refusal | None:
    """Why the parts of a run do not go together; None where they do."""
    return next((refusal for declared in DECLARATIONS if (refusal := declared(run)) is not None), None)


@for_alike_runs
def describe(run: Run, rank: int) -> ShardingSpec:
    """What ``rank`` holds under the run's strategy; pure, needs no process group."""
    match run.strategy:
        case "ddp":
            return ddp.describe(run, rank)
        case "fsdp2":
            return fsdp2.describe(run, rank)
        case _:
            return zero.describe(run, rank)


def apply(run: Run, device: torch.device, *, on_bytes: Callable[[int], None] = lambda _: None) -> Strategy:
    """Meta model -> checkpointing -> sharding -> weights into what sharding left -> optimizer over it.

    Needs the process group.

    Args:
        on_bytes: is told how many bytes of weights were read.

    Raises:
        CheckpointError: the weights are missing, damaged or of another model.
    """
    model = build_model(run.model)
    return shard(run, model, device, Weights(model, run.model, seed=run.seed, on_bytes=on_bytes))


def shard(run: Run, model: SftModel, device: torch.device, weights: Weights) -> Strategy:
    """The strategy over a model on the meta device, which it fills."""
    model.sequence_group = sequence_parallel.sequence_group(run)
    model.neftune_alpha, model.head.label_smoothing = run.neftune_alpha, run.label_smoothing
    model.token_multiple = model.head.row_multiple = multiple_for(device, TORCH_DTYPES[run.precision.compute])
    if model.token_multiple > 1:
        split_products(model)
    if run.compile:
        compile_fused(model, device, TORCH_DTYPES[run.precision.compute])
    apply_activation_checkpointing(model, run.activation_checkpointing)
    match run.strategy:
        case "ddp":
            return ddp.Ddp(run, model, device, weights)
        case "fsdp2":
            return fsdp2.Fsdp2(run, model, device, weights)
        case _:
            return zero.Zero(run, model, device, weights)


def shard_without_weights(run: Run) -> Strategy:
    """What one rank would hold, as shards on the meta device: of a size, and without memory.

    Needs a process group, and torch's "fake" one will do: a single process then stands for a rank of any world.

    Raises:
        ValueError: the strategy is not fsdp2; DDP and DeepSpeed need real tensors.
    """
    if run.strategy != "fsdp2":
        raise ValueError(f"{run.strategy} cannot shard a model that has no weights")
    model = build_model(run.model)
    apply_activation_checkpointing(model, run.activation_checkpointing)
    return fsdp2.Fsdp2(run, model, torch.device("meta"), None)
