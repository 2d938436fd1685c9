"""One optimizer step, and one pass over the evaluation set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import Step, micro_batches
from sft_dist.data.prepared import PreparedData
from sft_dist.sharding.strategy import Strategy


@dataclass(frozen=True)
class StepOutcome:
    """Scalars that may still be on the device; reading them waits for the step.

    Args:
        loss: mean over the step's supervised tokens, over all ranks.
        grad_norm: of that mean's gradient, before clipping.
    """

    loss: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class EvalOutcome:
    loss: float
    supervised_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def train_step(
    strategy: Strategy,
    data: PreparedData,
    plan: BatchPlan,
    step: Step,
    *,
    rank: int,
    device: torch.device,
    lr: float,
) -> StepOutcome:
    """Forward and backward over this rank's share of the step, then the update. No value is read from the device."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for batch, is_last in micro_batches(data, plan, step.sequences, rank):
        loss_sum += strategy.forward_backward(
            batch.to(device), supervised_in_step=step.supervised_tokens, is_last_micro_batch=is_last
        )
    result = strategy.step(lr)
    dist.all_reduce(loss_sum)
    return StepOutcome(loss=loss_sum / step.supervised_tokens, grad_norm=result.grad_norm)


def evaluate(
    strategy: Strategy, data: PreparedData, plan: BatchPlan, *, rank: int, device: torch.device
) -> EvalOutcome:
    """Mean loss over all supervised tokens of ``data``; the same on any number of ranks."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for batch, _ in micro_batches(data, plan, np.arange(data.num_sequences), rank):
        loss_sum += strategy.evaluate(batch.to(device))
    dist.all_reduce(loss_sum)
    tokens = int(data.num_supervised.sum())
    return EvalOutcome(loss=float(loss_sum) / tokens, supervised_tokens=tokens)
