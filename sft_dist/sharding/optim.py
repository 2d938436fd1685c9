"""The optimizer over a strategy's own parameters, its states, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sft_dist.config.schema import AdafactorConfig, AdamWConfig, OptimConfig, SgdConfig
from sft_dist.model.build import TORCH_DTYPES
from sft_dist.model.names import covered, covers
from sft_dist.run import Precision, Run
from sft_dist.sharding.adafactor import Adafactor
from sft_dist.sharding.adamw import MOMENTS, BlockwiseAdamW, MixedAdamW
from sft_dist.sharding.shard_optimizer import ShardOptimizer, local


@dataclass(frozen=True)
class Group:
    """What the optimizer does with a parameter; those with the same are one of its groups."""

    weight_decay: float
    lr_factor: float


def group_of(name: str, dimensions: int, config: OptimConfig) -> Group:
    """Weight decay is for matrices that no name of ``no_decay`` covers: norms and biases have one dimension."""
    decays = dimensions >= 2 and not any(covers(pattern, name) for pattern in config.no_decay)
    decay = config.weight_decay if decays else 0.0
    return Group(decay, config.lora_plus_ratio if ".lora_B." in name else 1.0)


def check_no_decay(run: Run) -> None:
    """
    Raises:
        ConfigError: a name of ``optim.no_decay`` changes nothing.
    """
    matrices = [p.name for p in run.model.trainable if len(p.shape) >= 2]
    parts = ", ".join(sorted({part for name in matrices for part in name.split(".") if not part.isdigit()}))
    fix = f"use parts of their names: {parts}; norms and biases have no weight decay in any case"
    covered(run.optim.no_decay, matrices, key="optim.no_decay", kind="trained matrix", fix=fix)


def decayed_numel(run: Run) -> int:
    """Trained numbers that weight decay is applied to."""
    return sum(p.numel for p in run.model.trainable if group_of(p.name, len(p.shape), run.optim).weight_decay)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Gives every group its rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def build_optimizer(
    config: OptimConfig, precision: Precision, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> Optimizer:
    """The optimizer over a strategy's parameters, in the dtypes of ``precision``.

    Torch's own where weights and states are of one dtype that needs no care: AdamW in its fused form, SGD in its
    multi-tensor form (it has no fused one for shards).

    Args:
        named_parameters: after sharding; under ZeRO-3 the true shape is ``ds_shape``.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    members: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in trainable:
        group = group_of(name, len(getattr(parameter, "ds_shape", parameter.shape)), config)
        members.setdefault(group, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": group.weight_decay, "lr": group.lr_factor * config.lr,
         "lr_factor": group.lr_factor}
        for group, parameters in members.items()
    ]  # fmt: skip
    if isinstance(config, SgdConfig):
        return SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)
    if isinstance(config, AdafactorConfig):
        return Adafactor(
            groups, lr=config.lr, decay_rate=config.decay_rate, clip_threshold=config.clip_threshold,
            scale_parameter=config.scale_parameter,
        )  # fmt: skip
    adamw: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    stored = precision.optimizer_state
    if stored == "8bit" or config.paged:
        return BlockwiseAdamW(groups, **adamw, bits=8 if stored == "8bit" else 32, paged=config.paged)
    if precision.master == stored == "fp32":
        # The fused form refuses tensors without data.
        return AdamW(groups, **adamw, fused=all(p.device.type != "meta" for _, p in trainable))
    return MixedAdamW(groups, **adamw, state_dtype=TORCH_DTYPES[stored])


def unsupported_on(run: Run, device_type: str) -> str | None:
    """Why the run's optimizer cannot step on such a device, or None."""
    if isinstance(run.optim, AdamWConfig) and run.optim.paged and device_type != "cuda":
        return "optim.paged is true, but CUDA's managed memory needs a GPU, and this run is on the CPU"
    return None


def state_kinds(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the states that are of their parameter's shape, for optimizers that keep no others."""
    if isinstance(optimizer, AdamW | MixedAdamW):
        return MOMENTS
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def states_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Every state of a parameter by its kind, each whole or a ``DTensor``; they share memory with the optimizer's own.

    Before the first step an optimizer has none, or has not yet made them: they are made here, as they start, all zeros.
    """
    if isinstance(optimizer, ShardOptimizer):
        return optimizer.whole_states(parameter)
    kept = optimizer.state[parameter]
    kinds = state_kinds(optimizer)
    if kinds and not kept:
        if isinstance(optimizer, AdamW):
            # A fused step counts on the device.
            kept["step"] = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
        kept |= {kind: torch.zeros_like(parameter, requires_grad=False) for kind in kinds}
    return {kind: kept[kind] for kind in kinds}


def set_completed_steps(optimizer: Optimizer, parameter: Tensor, completed_steps: int) -> None:
    """Tells an optimizer, which has states of a parameter, how many updates of it are behind them."""
    if isinstance(optimizer, ShardOptimizer):
        optimizer.state[parameter]["step"] = completed_steps
    elif isinstance(optimizer, AdamW):
        optimizer.state[parameter]["step"].fill_(completed_steps)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of 0-based ``step``.

    It rises linearly from 1/w to the whole peak over w warm-up steps, then decays so as to be 0 at ``num_steps``.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match config.schedule:
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return config.lr * (1 - progress)
        case "constant":
            return config.lr
