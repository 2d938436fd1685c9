"""A linear layer whose frozen weight is stored in fewer bits and dequantised whenever it is used.

bitsandbytes has such layers, and values here are bitsandbytes' own. The modules are ours, because its own repack a
weight in place on some CPUs when they are called in eval mode, and keep their quantisation state where neither sharding
nor a trace can see it. Here the packed weight is one ordinary parameter in the dtype that the strategies shard and
gather (``compute``: FSDP2 would cast any other), and the state is ordinary buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sft_dist.model.cpu_shapes import mm

# (tensors as ``QuantizedLinear.stored``, [out, in], dtype) -> weight
Dequantize = Callable[[tuple[Tensor, ...], tuple[int, int], torch.dtype], Tensor]


class QuantizedLinear(nn.Linear):
    """``y = x @ dequantised(weight).T + bias`` with a frozen weight.

    A subclass of ``nn.Linear`` so that PEFT puts its ordinary LoRA layer on it. A kind of quantisation says how large
    the packed weight is, what its state is, and what both stand for.

    Buffers keep their dtype through ``module.to(dtype)``: fp32 values are kept as int32 bits.
    """

    # What the configuration calls it.
    kind: ClassVar[str]

    @classmethod
    def in_place_of(cls, linear: nn.Linear, storage: torch.dtype) -> Self:
        """The layer that a quantised ``linear`` becomes, still without values but for its bias.

        Args:
            storage: the dtype that holds the packed bytes.
        """
        raise NotImplementedError

    @classmethod
    def quantize(cls, linear: nn.Linear, storage: torch.dtype) -> Self:
        """Quantises a whole layer."""
        module = cls.in_place_of(linear, storage)
        packed, scales = module.quantize_units(linear.weight.detach().flatten())
        module.weight = nn.Parameter(packed.view(module.weight.shape), requires_grad=False)
        module.set_scales(scales)
        return module

    @staticmethod
    def indivisible(linear: nn.Linear, storage: torch.dtype) -> str | None:
        """Why the shape of ``linear`` cannot be packed; None where it can."""
        raise NotImplementedError

    @property
    def unit(self) -> int:
        """Weights, one after the other, that are quantised together and share a scale."""
        raise NotImplementedError

    @property
    def num_units(self) -> int:
        return self.in_features * self.out_features // self.unit

    def quantize_units(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Packed values, flat, and [units] fp32 scales of some whole units of weights, given flat."""
        raise NotImplementedError

    def set_scales(self, absmax: Tensor) -> None:
        """Takes [units] fp32 scales of the whole weight."""
        raise NotImplementedError

    def stored(self) -> tuple[Tensor, ...]:
        """The packed weight and its state, from which ``dequantize`` makes the weight."""
        raise NotImplementedError

    @staticmethod
    def dequantize(stored: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in ``dtype``."""
        raise NotImplementedError

    def _set_packed(self, shape: tuple[int, ...], storage: torch.dtype, bias: nn.Parameter | None) -> None:
        self.weight = nn.Parameter(torch.empty(shape, dtype=storage, device="meta"), requires_grad=False)
        self.register_parameter("bias", bias)

    def _declare(self, **buffers: tuple[int, torch.dtype]) -> None:
        for name, (size, dtype) in buffers.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        y: Tensor = QuantizedMatmul.apply(x, self.dequantize, shape, *self.stored())
        return y if self.bias is None else y + self.bias


class QuantizedMatmul(torch.autograd.Function):
    """Keeps only the packed weight for backward and dequantises it there once more; input gradients only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantize: Dequantize, shape: tuple[int, int], *stored: Tensor) -> Tensor:
        ctx.dequantize, ctx.shape = dequantize, shape
        # The parameter itself, not a view of it: a sharded strategy frees and refills its storage between the passes.
        ctx.save_for_backward(*stored)
        return mm(x.reshape(-1, shape[1]), dequantize(stored, shape, x.dtype).T).view(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        stored = ctx.saved_tensors  # once: activation checkpointing hands each of them out a single time
        weight = ctx.dequantize(stored, ctx.shape, grad.dtype)
        grad_x = mm(grad.reshape(-1, grad.shape[-1]), weight).view(*grad.shape[:-1], weight.shape[1])
        return grad_x, None, None, *(None for _ in stored)
