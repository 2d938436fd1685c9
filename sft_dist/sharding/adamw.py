"""AdamW (arXiv 1711.05101) with moments, and weights, in fewer bits than fp32; arithmetic is in fp32 always."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from sft_dist.sharding.optimizer_states import BLOCK_SIZE, MIN_8BIT_NUMEL, num_blocks
from sft_dist.sharding.shard_optimizer import (
    Part,
    ShardOptimizer,
    first_element,
    gradient,
    largest_chunk_numel,
    local,
    whole,
)
from sft_dist.sharding.stochastic_rounding import store

# Elements that are widened to fp32 at a time: 64 MiB for each of a few temporaries.
CHUNK_NUMEL = 1 << 24

MOMENTS = ("exp_avg", "exp_avg_sq")


class MixedAdamW(ShardOptimizer):
    """AdamW over bf16 or fp32 weights with bf16 or fp32 moments; what is bf16 is rounded stochastically.

    Args:
        groups: parameters with their ``weight_decay``.
        state_dtype: of both moments.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
    ) -> None:
        self.state_dtype = state_dtype
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def empty_states(self, parameter: Tensor) -> dict[str, Tensor]:
        return {kind: torch.zeros_like(local(parameter), dtype=self.state_dtype) for kind in MOMENTS}

    def whole_states(self, parameter: Tensor) -> dict[str, Tensor]:
        return {kind: whole(self.state_of(parameter)[kind], parameter, tuple(parameter.shape)) for kind in MOMENTS}

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state_of(parameter)
            tensors = (local(parameter), gradient(parameter), *(state[kind] for kind in MOMENTS))
            flat = [tensor.view(-1) for tensor in tensors]
            first = first_element(parameter)
            for offset in range(0, flat[0].numel(), CHUNK_NUMEL):
                chunk = [t[offset : offset + CHUNK_NUMEL] for t in flat]
                _step(*chunk, group=group, step=state["step"], first=first + offset)


def _step(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, group: dict[str, Any], step: int, first: int
) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    g, w, m, v = (t.float() for t in (grad, weight, exp_avg, exp_avg_sq))
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    w.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    for stream, (tensor, value) in enumerate(((weight, w), (exp_avg, m), (exp_avg_sq, v))):
        if tensor is not value:  # else it was changed in place
            store(tensor, value, first=first, step=step, stream=stream)


class BlockwiseAdamW(ShardOptimizer):
    """bitsandbytes' AdamW over this rank's shards: 8-bit moments (Dettmers et al. 2021, arXiv 2110.02861), or paged.

    An 8-bit moment is a code for each element and an fp32 scale for each block of 256 successive elements of the shard.
    bitsandbytes' own optimizers cannot step on ``DTensor``; its kernels can on what a rank holds of one.

    Args:
        groups: parameters with their ``weight_decay``.
        bits: 8 or 32.
        paged: keep moments in CUDA's managed memory, which the driver moves between GPU and host by page.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        bits: int,
        paged: bool,
    ) -> None:
        self.bits, self.paged = bits, paged
        # What each code stands for. The second moment has no sign.
        self.codes = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def empty_states(self, parameter: Tensor) -> dict[str, Tensor]:
        mine = local(parameter)
        in_8bit = self.bits == 8 and parameter.numel() >= MIN_8BIT_NUMEL
        dtype = torch.uint8 if in_8bit else torch.float32
        states = {kind: self._zeros(mine.numel(), dtype, mine.device) for kind in MOMENTS}
        if in_8bit:
            blocks = num_blocks(largest_chunk_numel(parameter))
            for kind in MOMENTS:
                states[f"{kind}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=mine.device)
        return states

    def _zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.paged or numel == 0:
            return torch.zeros(numel, dtype=dtype, device=device)
        paged: Tensor = bnb.get_paged(numel, dtype=dtype, device=device)
        bnb.fill(paged, 0)
        return paged

    def whole_states(self, parameter: Tensor) -> dict[str, Tensor]:
        states = {kind: whole(self.state_of(parameter)[kind], parameter, tuple(parameter.shape)) for kind in MOMENTS}
        if "exp_avg_scale" in self.state_of(parameter):
            for kind in MOMENTS:
                scale = self.state_of(parameter)[f"{kind}_scale"]
                states[f"{kind}_scale"] = whole(scale, parameter, scale_shape(parameter))
        return states

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            weight, state = local(parameter), self.state_of(parameter)
            if weight.numel() == 0:
                continue
            if self.paged:
                for kind in MOMENTS:
                    bnb.prefetch_tensor(state[kind])
            grad = gradient(parameter).view(-1)
            if "exp_avg_scale" in state:
                self._update_8bit(group, weight.view(-1), grad, state)
            else:
                bnb.optimizer_update_32bit(
                    "adam", grad, weight.view(-1), state["exp_avg"], group["betas"][0], group["eps"], state["step"],
                    group["lr"], state["exp_avg_sq"], group["betas"][1], weight_decay=group["weight_decay"],
                )  # fmt: skip
        if self.paged and parameters:
            torch.cuda.synchronize()  # managed memory is the host's to read only when no kernel uses it

    def _update_8bit(self, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        blocks = num_blocks(weight.numel())
        if self.codes[0].device != weight.device:
            self.codes = self.codes[0].to(weight.device), self.codes[1].to(weight.device)
        scales = (state[f"{kind}_scale"][:blocks] for kind in MOMENTS)
        bnb.optimizer_update_8bit_blockwise(
            "adam", grad, weight, state["exp_avg"], state["exp_avg_sq"], *group["betas"], 0.0, 0.0, group["eps"],
            state["step"], group["lr"], *self.codes, *scales, group["weight_decay"],
        )  # fmt: skip


def scale_shape(parameter: Tensor) -> tuple[int, ...]:
    """How a checkpoint holds the scales of an 8-bit moment.

    One row of blocks, the same for any number of ranks, where no block of the whole parameter crosses from one rank to
    another; else as many rows as there are ranks, so that another number of ranks finds another shape and does not take
    one block's scale for another's.
    """
    ranks, chunk = Part.of(parameter).count, largest_chunk_numel(parameter)
    if parameter.numel() == ranks * chunk and chunk % BLOCK_SIZE == 0:
        return (parameter.numel() // BLOCK_SIZE,)
    return ranks, num_blocks(chunk)
