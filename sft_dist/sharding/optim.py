"""The optimizer over a strategy's own parameters, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from sft_dist.config.schema import AdamWConfig, OptimConfig


def build_optimizer(
    config: OptimConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device
) -> Optimizer:
    """AdamW in torch's fused form, or SGD in its multi-tensor form (it has no fused one for shards).

    Weight decay is for matrices: norms and biases, which have one dimension, are left alone.

    Args:
        named_parameters: after sharding; under ZeRO-3 the true shape is ``ds_shape``.
    """
    trainable = [p for _, p in named_parameters if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    groups = [g for g in groups if g["params"]]
    if isinstance(config, AdamWConfig):
        return AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=device.type != "meta"
        )
    return SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)


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
