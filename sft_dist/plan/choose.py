"""Makes every ``auto`` of a configuration concrete, by a stated rule.

``sharding.strategy: auto``

1. What ``accelerate launch`` chose: FSDP -> fsdp2, with its resharding; DeepSpeed -> zero1, zero2 or zero3, with its
   offload or its file.
2. Else, where not even fsdp2's share of parameters, gradients and optimizer fits a device: ``PlanError``.
3. Else ddp for one process, or where all of them take at most half of a device's memory.
4. Else fsdp2.

``activation_checkpointing.mode: auto``: full where accelerate's FSDP asks for it; none where states, gathered weights
and an upper estimate of the activations take at most 80 % of a device's memory; else full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sft_dist.config.deepspeed import stage_in
from sft_dist.config.schema import (
    ActivationCheckpointingConfig,
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
from sft_dist.plan.states import activation_bytes, gather_bytes, state_bytes, with_world_size
from sft_dist.plan.units import gib
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import DEFAULT_ZERO_STAGE, AccelerateChoice
from sft_dist.runtime.world import WorldShape

DDP_SHARE = 0.5  # the other half is for activations, buckets and the allocator
NO_CHECKPOINTING_SHARE = 0.8

MOST_RANKS = 1024


@dataclass(frozen=True)
class Choice:
    """A configuration without ``auto``, and one line for each decision that was made; none where none was."""

    config: Config
    reasons: list[str]


def choose(
    config: Config, shape: WorldShape, *, memory_bytes: int, accelerate: AccelerateChoice | None = None
) -> Choice:
    """Decides what the configuration leaves open; a function of its arguments and the model's ``config.json``.

    Args:
        memory_bytes: of one process's device; the same number on all ranks, or they would choose differently.
        accelerate: what ``accelerate launch`` said, where it started the processes.

    Raises:
        ConfigError: the model's configuration or accelerate's DeepSpeed file cannot be read, or what accelerate chose
            does not go with another key.
        PlanError: not even fsdp2's share of the states fits.
    """
    reasons: list[str] = []
    if isinstance(config.sharding, AutoSharding):
        sharding, reason = _strategy(config, shape, memory_bytes, accelerate)
        stated = {"sequence_parallel": config.sharding.sequence_parallel}
        config = config.model_copy(update={"sharding": sharding.model_copy(update=stated)})
        reasons.append(f"sharding.strategy auto -> {reason}")
    if config.activation_checkpointing.mode == "auto":
        mode, reason = _checkpointing(config, shape, memory_bytes, accelerate)
        config = config.model_copy(update={"activation_checkpointing": mode})
        reasons.append(f"activation_checkpointing.mode auto -> {reason}")
    if reasons:
        validate(config)
    return Choice(config, reasons)


def _strategy(
    config: Config, shape: WorldShape, memory_bytes: int, accelerate: AccelerateChoice | None
) -> tuple[ConcreteSharding, str]:
    if accelerate is not None and accelerate.family == "fsdp":
        sharding = Fsdp2Sharding(reshard_after_forward=accelerate.reshard_after_forward is not False)
        return sharding, f"fsdp2: accelerate launch chose FSDP with {accelerate.reshard_name}"
    if accelerate is not None and accelerate.family == "deepspeed":
        return _deepspeed(accelerate)
    return _by_memory(config, shape, memory_bytes)


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


def _run_with(config: Config, shape: WorldShape, sharding: ConcreteSharding) -> Run:
    undecided = config.activation_checkpointing.mode == "auto"
    concrete = {"sharding": sharding}
    mode = {"activation_checkpointing": ActivationCheckpointingConfig(mode="full")} if undecided else {}
    return resolve(config.model_copy(update=concrete | mode), shape)


def _by_memory(config: Config, shape: WorldShape, memory_bytes: int) -> tuple[ConcreteSharding, str]:
    ddp: ConcreteSharding = DdpSharding(strategy="ddp")
    run = _run_with(config, shape, ddp)
    sharded_run = replace(run, sharding=Fsdp2Sharding())
    whole, sharded = state_bytes(run).total, state_bytes(sharded_run).total
    if sharded > memory_bytes:
        raise _does_not_fit(sharded_run, sharded, memory_bytes)
    states = f"parameters, gradients and optimizer take {gib(whole)} a process under ddp"
    if shape.size == 1:
        return ddp, f"ddp: one process; {states}, of {gib(memory_bytes)}"
    if whole <= DDP_SHARE * memory_bytes:
        return ddp, f"ddp: {states}, at most half of {gib(memory_bytes)}"
    reason = f"fsdp2: {states}, more than half of {gib(memory_bytes)}; {gib(sharded)} under fsdp2"
    return Fsdp2Sharding(), reason


def _does_not_fit(run: Run, needed: int, memory_bytes: int) -> PlanError:
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
    return PlanError(
        f"parameters, gradients and optimizer need {gib(needed)} a process even when fsdp2 shards them over "
        f"{run.world.size}, and a process has {gib(memory_bytes)}",
        fix="use " + ", or ".join(helps),
    )


def _checkpointing(
    config: Config, shape: WorldShape, memory_bytes: int, accelerate: AccelerateChoice | None
) -> tuple[ActivationCheckpointingConfig, str]:
    if accelerate is not None and accelerate.activation_checkpointing:
        reason = "full: accelerate launch has fsdp_activation_checkpointing true"
        return config.activation_checkpointing.model_copy(update={"mode": "full"}), reason
    assert not isinstance(config.sharding, AutoSharding)
    run = _run_with(config, shape, config.sharding)
    parts = {
        "states": state_bytes(run).total,
        "gathered or cast weights": gather_bytes(run),
        "activations (at most)": activation_bytes(run),
    }
    total, allowed = sum(parts.values()), NO_CHECKPOINTING_SHARE * memory_bytes
    mode = "none" if total <= allowed else "full"
    listed = " + ".join(f"{name} {gib(size)}" for name, size in parts.items())
    relation = "within" if mode == "none" else "more than"
    reason = f"{mode}: {listed} = {gib(total)}, {relation} 80 % of {gib(memory_bytes)}"
    return config.activation_checkpointing.model_copy(update={"mode": mode}), reason
