"""What travels between a GPU and host memory in a step, and what the optimizer's step takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from sft_dist.config.deepspeed import Zero3Knobs
from sft_dist.config.schema import AdafactorConfig, Fsdp2Sharding
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.rates import Rates
from sft_dist.plan.schedule import Transfer
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding import registry
from sft_dist.sharding.activation_checkpointing import checkpointed_blocks
from sft_dist.sharding.collectives import Every, blocks_with_backward, members
from sft_dist.sharding.remember import for_alike_runs

OFFLOAD = "offload"


def at_rate(copies: Iterable[Transfer], rates: Rates) -> tuple[Transfer, ...]:
    """What ``host_transfers`` found, with the seconds that a GPU's link to its host takes."""
    return tuple(replace(copy, seconds=copy.seconds / rates.host_link_bytes_per_s) for copy in copies)


def host_transfers(run: Run, *, tokens: float) -> tuple[Transfer, ...]:
    """Everything that a step copies between device and host, with its bytes in place of seconds.

    Args:
        tokens: of a micro-batch on this rank.
    """
    on_host = registry.describe(run, 0).on_host
    found: list[Transfer] = []
    if "parameters" in on_host:
        found.extend(_parameters(run))
    if "optimizer" in on_host:
        found.extend(_gradients(run))
    if run.activation_checkpointing.offload:
        found.extend(_activations(run, tokens))
    return tuple(found)


def _shards(run: Run) -> int:
    replicas = run.sharding.dp_replicate if isinstance(run.sharding, Fsdp2Sharding) else 1
    return run.world.size // replicas


def _parameters(run: Run) -> Iterator[Transfer]:
    """This rank's shard of a unit goes to the device whenever the unit is gathered, in the dtype that is kept.

    What FSDP2 does not free after forward is gathered once a step: the root, and blocks if they are kept.
    """
    needed = blocks_with_backward(run)
    for block in (None, *range(run.model.num_layers)):
        size = sum(
            p.numel * DTYPE_BYTES[run.precision.stored(trainable=p.trainable, strategy=run.strategy)]
            for p in members(run, block)
        )
        copied = size / _shards(run)
        is_kept = isinstance(run.sharding, Fsdp2Sharding) and (block is None or not run.sharding.reshard_after_forward)
        every: Every = "first_micro_batch" if is_kept else "micro_batch"
        yield Transfer(copied, "forward", every, block, "before", part=OFFLOAD)
        if block is not None and block in needed and not is_kept:
            yield Transfer(copied, "backward", "micro_batch", block, "before", part=OFFLOAD)


def _gradients(run: Run) -> Iterator[Transfer]:
    """Reduced gradients of this rank's part go to the host; DeepSpeed brings updated weights back."""
    width = DTYPE_BYTES["fp32"] if run.strategy in ZERO_STAGES else DTYPE_BYTES[run.precision.master]
    once = run.strategy == "zero1" or (isinstance(run.sharding, Fsdp2Sharding) and run.sharding.reduce_once_a_step)
    when: Every = "last_micro_batch" if once else "micro_batch"
    for block in (*reversed(range(run.model.num_layers)), None):
        numel = sum(p.numel for p in members(run, block) if p.trainable) / _shards(run)
        if numel:
            yield Transfer(numel * width, "backward", when, block, "after", part=OFFLOAD)
    if run.strategy in ZERO_STAGES and "parameters" not in registry.describe(run, 0).on_host:
        back = run.model.num_trainable / _shards(run) * DTYPE_BYTES[run.precision.compute]
        yield Transfer(back, "step", "step", None, "after", False, part=OFFLOAD)


def _activations(run: Run, tokens: float) -> Iterator[Transfer]:
    """Inputs of recomputed blocks, there and back, in the stream that computes."""
    copied = tokens * run.model.hidden_size * DTYPE_BYTES[run.precision.compute]
    recomputed = set(checkpointed_blocks(run.activation_checkpointing, run.model.blocks))
    for block, name in enumerate(run.model.blocks):
        if name in recomputed:
            yield Transfer(copied, "forward", "micro_batch", block, "after", False, part=OFFLOAD)
            yield Transfer(copied, "backward", "micro_batch", block, "before", False, part=OFFLOAD)


def update_seconds(run: Run, rates: Rates) -> float:
    """Of norm, clipping and update, which read and write memory: the device's, or the host's where it steps there."""
    size = update_traffic_bytes(run)
    if "optimizer" in registry.describe(run, 0).on_host:
        return size / rates.host_memory_bytes_per_s
    return rates.copy_seconds(size)


@for_alike_runs
def update_traffic_bytes(run: Run) -> int:
    """Read and written once each: gradients for the norm, again for clipping, and by the update; masters; states.

    Adafactor makes a whole update of each parameter beside that. DeepSpeed copies masters to the weights.
    """
    spec = registry.describe(run, 0)
    numel, master = spec.optimizer_numel, DTYPE_BYTES[spec.optimizer_dtype]
    gradient = DTYPE_BYTES["fp32"] if run.strategy in ZERO_STAGES else master
    passes = 2 + 2 * (run.optim.max_grad_norm is not None)
    size = numel * (passes * gradient + 2 * master) + 2 * spec.optimizer_state_bytes
    if isinstance(run.optim, AdafactorConfig):
        size += 4 * numel * DTYPE_BYTES["fp32"]
    if run.strategy in ZERO_STAGES:
        size += numel * (master + DTYPE_BYTES[run.precision.compute])
        if isinstance(run.deepspeed, Zero3Knobs):  # a flat copy of the gradients
            size += 2 * numel * gradient
    return size
