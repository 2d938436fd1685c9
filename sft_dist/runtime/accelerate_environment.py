"""What ``accelerate launch`` told its processes about the training it expects. Pure; imports no torch.

Names and defaults are those of accelerate 1.15: ``utils/launch.py`` writes the variables, ``utils/dataclasses.py``
reads them. The launcher writes every FSDP setting, stated or not, so a value that equals accelerate's default says
nothing; of DeepSpeed it writes only what was stated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sft_dist.errors import ConfigError

# accelerate's own value where nothing was said (``DeepSpeedPlugin``).
DEFAULT_ZERO_STAGE = 2

# Any of these is set by every way in which ``accelerate launch`` starts processes.
MARKS = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")

FSDP1_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")

TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


@dataclass(frozen=True)
class AccelerateChoice:
    """The settings of one ``accelerate launch``; None where it stated nothing.

    Args:
        family: ``fsdp`` or ``deepspeed``; None for plain multi-GPU, which chooses no strategy.
        zero_stage: of DeepSpeed; None too where ``deepspeed_config_file`` says it.
        reshard_after_forward: of FSDP, by whichever of its two names.
        reshard_name: that name, with its value.
        mixed_precision: ``bf16``; None for ``no``.
        gradient_accumulation_steps, gradient_clipping: of DeepSpeed.
        offload_optimizer, offload_param: DeepSpeed's, to host memory.
        activation_checkpointing: of FSDP.
        deepspeed_config_file: path of a JSON file.
        unsupported: (setting as users write it, why not or what instead) for what no configuration here can honour.
    """

    family: Literal["fsdp", "deepspeed"] | None = None
    zero_stage: int | None = None
    reshard_after_forward: bool | None = None
    reshard_name: str = ""
    mixed_precision: str | None = None
    gradient_accumulation_steps: int | None = None
    gradient_clipping: float | None = None
    offload_optimizer: bool = False
    offload_param: bool = False
    activation_checkpointing: bool = False
    deepspeed_config_file: str | None = None
    unsupported: tuple[tuple[str, str], ...] = ()


def read_accelerate_environment(env: Mapping[str, str] = os.environ) -> AccelerateChoice | None:
    """What accelerate chose, or None where it started nothing.

    Raises:
        ConfigError: a variable has a value that accelerate never writes.
    """
    if not any(name in env for name in MARKS):
        return None
    unsupported = _unsupported_everywhere(env)
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    common = AccelerateChoice(
        mixed_precision="bf16" if precision == "bf16" else None,
        gradient_accumulation_steps=_integer(env, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        gradient_clipping=_number(env, "ACCELERATE_GRADIENT_CLIPPING"),
        unsupported=tuple(unsupported),
    )
    if _flag(env, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed(env, common)
    if _flag(env, "ACCELERATE_USE_FSDP"):
        return _fsdp(env, common)
    return common


def _fsdp(env: Mapping[str, str], common: AccelerateChoice) -> AccelerateChoice:
    unsupported = list(common.unsupported)
    if env.get("FSDP_VERSION", "1") == "1":
        strategy = env.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
        if strategy.isdigit() and 1 <= int(strategy) <= len(FSDP1_STRATEGIES):
            strategy = FSDP1_STRATEGIES[int(strategy) - 1]
        name, reshard = f"fsdp_sharding_strategy {strategy}", strategy != "SHARD_GRAD_OP"
        if strategy == "NO_SHARD":
            unsupported.append((name, "start with --multi_gpu and set sharding.strategy to ddp"))
        elif strategy not in ("FULL_SHARD", "SHARD_GRAD_OP"):
            unsupported.append((name, "set it to FULL_SHARD, and replicas in the configuration: sharding.dp_replicate"))
    else:
        reshard = _flag(env, "FSDP_RESHARD_AFTER_FORWARD", default=True)
        name = f"fsdp_reshard_after_forward {str(reshard).lower()}"
    if _flag(env, "FSDP_OFFLOAD_PARAMS"):
        fix = "set it to false, and offload in the configuration: sharding.cpu_offload"
        unsupported.append(("fsdp_offload_params true", fix))
    if _flag(env, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        fix = "set it to false, and offload in the configuration: activation_checkpointing.offload"
        unsupported.append(("fsdp_activation_checkpointing_offload true", fix))
    return replace(
        common,
        family="fsdp",
        reshard_after_forward=reshard,
        reshard_name=name,
        activation_checkpointing=_flag(env, "FSDP_ACTIVATION_CHECKPOINTING"),
        unsupported=tuple(unsupported),
    )


def _deepspeed(env: Mapping[str, str], common: AccelerateChoice) -> AccelerateChoice:
    unsupported = list(common.unsupported)
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    stage = _integer(env, "ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage is not None and stage not in (1, 2, 3):
        unsupported.append((f"deepspeed zero_stage {stage}", "set it to 1, 2 or 3, or start with --multi_gpu for ddp"))
        stage = None
    on_host = {}
    for part in ("optimizer", "param"):
        device = env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none").lower()
        on_host[part] = device == "cpu"
        if device not in ("cpu", "none"):
            unsupported.append((f"deepspeed offload_{part}_device {device}", "set it to cpu or none"))
    return replace(
        common,
        family="deepspeed",
        zero_stage=stage,
        offload_optimizer=on_host["optimizer"],
        offload_param=on_host["param"],
        deepspeed_config_file=None if file == "none" else file,
        unsupported=tuple(unsupported),
    )


def _unsupported_everywhere(env: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        found.append((f"--mixed_precision {precision}", "set it to bf16 or no; precision.compute is bf16 or fp32"))
    backend = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        found.append((f"--dynamo_backend {backend}", "set it to no, and train.compile: true in the configuration"))
    if _flag(env, "ACCELERATE_USE_MEGATRON_LM"):
        found.append(("--use_megatron_lm", "start with --multi_gpu, --use_fsdp or --use_deepspeed"))
    if _flag(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        for kind in ("tp", "cp", "sp", "dp_replicate"):
            size = env.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1")
            if size != "1":
                fix = "set it to 1: all processes are data-parallel"
                if kind in ("cp", "sp"):
                    fix = "set it to 1; what lets ranks share sequences here is sharding.sequence_parallel"
                found.append((f"parallelism_config_{kind}_size {size}", fix))
    return found


def _flag(env: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    value = env.get(name, str(default)).lower()
    if value not in (*TRUE, *FALSE):
        raise ConfigError(f"the environment's {name} is {env[name]!r}", fix=f"set {name} to true or false, or unset it")
    return value in TRUE


def _integer(env: Mapping[str, str], name: str) -> int | None:
    value = _number(env, name)
    return None if value is None else int(value)


def _number(env: Mapping[str, str], name: str) -> float | None:
    value = env.get(name, "auto").lower()
    if value in ("auto", "none"):
        return None
    try:
        return float(value)
    except ValueError:
        raise ConfigError(
            f"the environment's {name} is {value!r}", fix=f"set {name} to a number, or unset it"
        ) from None
