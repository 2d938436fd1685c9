"""Adafactor (arXiv 1804.04235) whose statistics are those of whole tensors, however the ranks share them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.sharding.shard_optimizer import Part, ShardOptimizer, first_element, gradient, local, whole
from sft_dist.sharding.stochastic_rounding import store

# Section 9 of the paper: what is added to squares, and the least root mean square that a tensor counts as having.
EPS_SQUARE = 1e-30
EPS_SCALE = 1e-3


class Adafactor(ShardOptimizer):
    """Algorithms 4 and 5 of the paper without a first moment and with the learning rate given from outside.

    A matrix has the running mean of the squared gradient of every row and of every column, a vector that of every
    element. Ranks hold whole rows, so a row's mean is at home. What runs over rows (each column's squares, the mean of
    the row means, the squares of the weights) is added up over the shard group in one all-reduce for a whole group of
    parameters, and the squares of the updates, by which they are clipped, in a second one.

    Args:
        groups: parameters with their ``weight_decay``.
        decay_rate: the running means keep 1 - step^decay_rate of what they were.
        clip_threshold: largest root mean square of a tensor's update before the learning rate.
        scale_parameter: multiply the learning rate by the tensor's root mean square.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        decay_rate: float,
        clip_threshold: float,
        scale_parameter: bool,
    ) -> None:
        self.decay_rate, self.clip_threshold, self.scale_parameter = decay_rate, clip_threshold, scale_parameter
        super().__init__(groups, {"lr": lr})

    def empty_states(self, parameter: Tensor) -> dict[str, Tensor]:
        mine = local(parameter)
        if parameter.dim() < 2:
            return {"exp_avg_sq": torch.zeros_like(mine, dtype=torch.float32)}
        columns = math.prod(parameter.shape[1:])
        row, col = (torch.zeros(size, dtype=torch.float32, device=mine.device) for size in (mine.shape[0], columns))
        return {"exp_avg_sq_row": row, "exp_avg_sq_col": col}

    def whole_states(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state_of(parameter)
        if parameter.dim() < 2:
            return {"exp_avg_sq": whole(state["exp_avg_sq"], parameter, tuple(parameter.shape))}
        row = whole(state["exp_avg_sq_row"], parameter, (parameter.shape[0],))
        return {"exp_avg_sq_row": row, "exp_avg_sq_col": state["exp_avg_sq_col"]}

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        ranks = Part.of(parameters[0]).group
        sums = _all_reduced([self._bring_up(p) for p in parameters], ranks)
        factors = [self._factors(p, s) for p, s in zip(parameters, sums, strict=True)]
        # Each update is made twice: all of them, kept until their squares are known, are as large as the weights.
        updates = zip(parameters, factors, strict=True)
        squares = _all_reduced([_square_sum(_update(parameter, factor)) for parameter, factor in updates], ranks)
        for parameter, factor, total, square in zip(parameters, factors, sums, squares, strict=True):
            scale = (total[-1] / parameter.numel()).sqrt().clamp(min=EPS_SCALE) if self.scale_parameter else 1.0
            clip = ((square[0] / parameter.numel()).sqrt() / self.clip_threshold).clamp(min=1.0)
            weight = local(parameter).view(-1)
            value = weight.float() * (1 - group["lr"] * group["weight_decay"] * scale)
            value -= _update(parameter, factor).view(-1) * (group["lr"] * scale / clip)
            step = self.state_of(parameter)["step"]
            store(weight, value, first=first_element(parameter), step=step, stream=0)

    def _bring_up(self, parameter: Tensor) -> Tensor:
        """Brings the means that are at home up to this step, and returns this rank's part of what is not.

        Returns:
            fp64; [columns + 2] of a matrix: squared gradients by column, the sum of the row means, squared weights; [1]
            of a vector: the last of these.
        """
        state = self.state_of(parameter)
        new = state["step"] ** self.decay_rate
        square = gradient(parameter).float().square().add_(EPS_SQUARE)
        weights = _square_sum(local(parameter).float() if self.scale_parameter else square.new_zeros(()))
        if parameter.dim() < 2:
            state["exp_avg_sq"].lerp_(square, new)
            return weights
        square = square.flatten(1)
        state["exp_avg_sq_row"].lerp_(square.mean(1), new)
        return torch.cat(
            [square.sum(0, dtype=torch.float64), state["exp_avg_sq_row"].sum(dtype=torch.float64)[None], weights]
        )

    def _factors(self, parameter: Tensor, sums: Tensor) -> tuple[Tensor, ...]:
        """What the gradient is multiplied by: a vector's own factors, or a matrix's by row and by column."""
        state = self.state_of(parameter)
        if parameter.dim() < 2:
            return (state["exp_avg_sq"].rsqrt(),)
        rows = parameter.shape[0]
        column_means = (sums[:-2] / rows).float()
        state["exp_avg_sq_col"].lerp_(column_means, state["step"] ** self.decay_rate)
        row_mean = (sums[-2] / rows).float()
        return (state["exp_avg_sq_row"] / row_mean).rsqrt()[:, None], state["exp_avg_sq_col"].rsqrt()


def _update(parameter: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """This rank's part of the update before clipping and the learning rate, fp32, rows flattened."""
    grad = gradient(parameter).float()
    result = grad.flatten(1) if parameter.dim() > 1 else grad
    for factor in factors:
        result = result * factor
    return result


def _square_sum(tensor: Tensor) -> Tensor:
    """[1] fp64."""
    return tensor.square().sum(dtype=torch.float64)[None]


def _all_reduced(parts: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The sums of 1-D tensors over the ranks of ``group``, in one collective; themselves where nothing is shared."""
    if group is None:
        return parts
    flat = torch.cat(parts)
    dist.all_reduce(flat, group=group)
    return list(flat.split([part.numel() for part in parts]))
