"""Makes every ``auto`` of a configuration concrete, by a stated rule.

``sharding.strategy: auto``

1. What ``accelerate launch`` chose: FSDP -> fsdp2, with its resharding; DeepSpeed -> zero1, zero2 or zero3, with its
   offload or its file.
2. Else, where not even fsdp2's share of parameters, gradients and optimizer fits a device: ``PlanError``.
3. Else ddp for one process, or where all of them take at most half of a device's memory.
4. Else fsdp2.

``activation_checkpointing.mode: auto``: full where accelerate's FSDP asks for it; else as ``plan/room.py`` says, and so
``train.micro_batch_size: auto``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sft_dist.config.deepspeed import stage_in
from sft_dist.config.schema import (
    AutoSharding,
    ConcreteSharding,
    Config,
    DdpSharding,
    Fsdp2Sharding,
    Zero1Sharding,
    Zero2Sharding,
    Zero3Sharding,
)
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError, PlanError
from sft_dist.plan.room import (
    Room,
    largest_micro_batch_size,
    least_recomputation,
    with_first_micro_batches,
    with_micro_batch_size,
    with_mode,
)
from sft_dist.plan.states import state_bytes, with_world_size
from sft_dist.plan.units import gib
from sft_dist.resolve import Describe, described_once, resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import DEFAULT_ZERO_STAGE, AccelerateChoice
from sft_dist.runtime.world import WorldShape

DDP_SHARE = 0.5  # the other half is for activations, buckets and the allocator

MOST_RANKS = 1024


class NothingFits(PlanError):
    """Not even the strategy that takes least of a device fits it."""


@dataclass(frozen=True)
class Choice:
    """A configuration without ``auto``, and one line for each decision that was made; none where none was."""

    config: Config
    reasons: list[str]


def choose(
    config: Config,
    shape: WorldShape,
    *,
    memory_bytes: int,
    accelerate: AccelerateChoice | None = None,
    describe: Describe | None = None,
    on_cpu: bool = False,
) -> Choice:
    """Decides what the configuration leaves open; a function of its arguments and the model's ``config.json``.

    Needs no process group, no GPU and no weights. Where ranks share sequences there must be no process group yet.

    Args:
        memory_bytes: of one process's device; the same number on all ranks, or they would choose differently.
        accelerate: what ``accelerate launch`` said, where it started the processes.
        describe: as for ``resolve``.
        on_cpu: the processes train on CPUs.

    Raises:
        ConfigError: the model's configuration or accelerate's DeepSpeed file cannot be read, or what accelerate chose
            does not go with another key.
        NothingFits: not even fsdp2's share of the states fits.
    """
    room = Room(shape, memory_bytes, described_once(describe), on_cpu)
    reasons: list[str] = []
    if isinstance(config.sharding, AutoSharding):
        sharding, reason = _strategy(config, room, accelerate)
        stated = {"sequence_parallel": config.sharding.sequence_parallel}
        config = config.model_copy(update={"sharding": sharding.model_copy(update=stated)})
        reasons.append(f"sharding.strategy auto -> {reason}")
    if config.activation_checkpointing.mode == "auto":
        config, reason = _checkpointing(config, room, accelerate)
        reasons.append(f"activation_checkpointing.mode auto -> {reason}")
    if config.train.micro_batch_size == "auto":
        size, reason = largest_micro_batch_size(config, room)
        config = with_micro_batch_size(config, size)
        reasons.append(f"train.micro_batch_size auto -> {reason}")
    if reasons:
        validate(config)
    return Choice(config, reasons)


def nearest(config: Config, why: NothingFits) -> Choice:
    """What comes nearest to fitting: every ``auto`` as what takes least of a device."""
    sharding = Fsdp2Sharding(sequence_parallel=config.sharding.sequence_parallel)
    config = config.model_copy(update={"sharding": sharding})
    reasons = [f"sharding.strategy auto -> fsdp2, but nothing fits: {why.what}"]
    if config.activation_checkpointing.mode == "auto":
        config = with_mode(config, "full")
        reasons.append("activation_checkpointing.mode auto -> full: it takes least")
    if config.train.micro_batch_size == "auto":
        config = with_micro_batch_size(config, 1)
        reasons.append("train.micro_batch_size auto -> 1: it takes least")
    validate(config)
    return Choice(config, reasons)


def _strategy(config: Config, room: Room, accelerate: AccelerateChoice | None) -> tuple[ConcreteSharding, str]:
    if accelerate is not None and accelerate.family == "fsdp":
        sharding = Fsdp2Sharding(reshard_after_forward=accelerate.reshard_after_forward is not False)
        return sharding, f"fsdp2: accelerate launch chose FSDP with {accelerate.reshard_name}"
    if accelerate is not None and accelerate.family == "deepspeed":
        return _deepspeed(accelerate)
    return _by_memory(config, room)


def _deepspeed(accelerate: AccelerateChoice) -> tuple[ConcreteSharding, str]:
    file, stage = accelerate.deepspeed_config_file, accelerate.zero_stage
    if file is not None:
        stage = stage or stage_in(file)
        if stage not in (1, 2, 3):
            raise ConfigError(
                f"{file}: zero_optimization.stage is {stage}, and accelerate launch states no zero_stage",
                fix="write zero_optimization.stage 1, 2 or 3 there, or set sharding.strategy to zero1, zero2 or zero3",
            )
        sharding = _zero(stage, file)
        return sharding, f"zero{stage}: accelerate launch chose DeepSpeed with {file}"
    stage = stage or DEFAULT_ZERO_STAGE
    on_host = {"optimizer": accelerate.offload_optimizer, "param": accelerate.offload_param}
    knobs: dict[str, Any] = {f"offload_{part}": {"device": "cpu"} for part, wanted in on_host.items() if wanted}
    sharding = _zero(stage, {"zero_optimization": knobs} if knobs else None)
    offload = "".join(f", {name} on the host" for name in knobs)
    return sharding, f"zero{stage}: accelerate launch chose DeepSpeed with zero_stage {stage}{offload}"


def _zero(stage: int, knobs: str | dict[str, Any] | None) -> ConcreteSharding:
    match stage:
        case 1:
            return Zero1Sharding(strategy="zero1", deepspeed_config=knobs)
        case 2:
            return Zero2Sharding(strategy="zero2", deepspeed_config=knobs)
        case _:
            return Zero3Sharding(strategy="zero3", deepspeed_config=knobs)


def _by_memory(config: Config, room: Room) -> tuple[ConcreteSharding, str]:
    ddp: ConcreteSharding = DdpSharding(strategy="ddp")
    undecided = config.activation_checkpointing.mode == "auto"
    concrete = with_first_micro_batches(with_mode(config, "full") if undecided else config)
    run = resolve(concrete.model_copy(update={"sharding": ddp}), room.shape, describe=room.describe)
    sharded_run = replace(run, sharding=Fsdp2Sharding())
    memory_bytes = room.memory_bytes
    whole, sharded = state_bytes(run).total, state_bytes(sharded_run).total
    if sharded > memory_bytes:
        raise _does_not_fit(sharded_run, sharded, memory_bytes)
    states = f"parameters, gradients and optimizer take {gib(whole)} a process under ddp"
    if room.shape.size == 1:
        return ddp, f"ddp: one process; {states}, of {gib(memory_bytes)}"
    if whole <= DDP_SHARE * memory_bytes:
        return ddp, f"ddp: {states}, at most half of {gib(memory_bytes)}"
    reason = f"fsdp2: {states}, more than half of {gib(memory_bytes)}; {gib(sharded)} under fsdp2"
    return Fsdp2Sharding(), reason


def _does_not_fit(run: Run, needed: int, memory_bytes: int) -> NothingFits:
    """``run`` is under fsdp2."""
    helps = []
    size = run.world.size
    while size < MOST_RANKS:
        size *= 2
        if state_bytes(with_world_size(run, size)).total <= memory_bytes:
            helps.append(f"{size} processes of this memory")
            break
    if run.model.method.type != "qlora":
        helps.append("method.type lora or qlora" if run.model.method.type == "full" else "method.type qlora")
    helps.append("sharding.strategy zero3 with sharding.deepspeed_config configs/deepspeed/zero3_offload.json")
    return NothingFits(
        f"parameters, gradients and optimizer need {gib(needed)} a process even when fsdp2 shards them over "
        f"{run.world.size}, and a process has {gib(memory_bytes)}",
        fix="use " + ", or ".join(helps),
    )


def _checkpointing(config: Config, room: Room, accelerate: AccelerateChoice | None) -> tuple[Config, str]:
    if accelerate is not None and accelerate.activation_checkpointing:
        return with_mode(config, "full"), "full: accelerate launch has fsdp_activation_checkpointing true"
    mode, reason = least_recomputation(config, room)
    return with_mode(config, mode), reason
