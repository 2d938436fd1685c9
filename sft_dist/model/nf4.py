"""Linear layers whose frozen weight is stored in NF4 with double quantisation (arXiv 2305.14314, section 3).

Bytes and dequantised values are bitsandbytes' own; the module is ours, because ``bitsandbytes.nn.Linear4bit`` repacks
its weight in place on some CPUs when it is called in eval mode, and keeps its quantisation state where neither sharding
nor a trace can see it. Here the packed weight is one ordinary parameter in the dtype that the strategies shard, and the
state is ordinary buffers.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

# Weights that share one scale, and scales that share one scale of scales.
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256


class NF4Linear(nn.Linear):
    """``y = x @ dequantised(weight).T + bias`` with a frozen weight of half a byte a parameter.

    A subclass of ``nn.Linear`` so that PEFT puts its ordinary LoRA layer on it.

    Buffers (their dtypes survive ``module.to(dtype)``: fp32 values are kept as int32 bits):
        absmax: [blocks] uint8, quantised scales.
        nested_absmax: [ceil(blocks / 256)] int32, bits of the fp32 scales of scales.
        offset: [1] int32, bits of the fp32 mean of the scales.
    """

    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: nn.Parameter | None, storage: torch.dtype) -> None:
        """An empty layer on the meta device; ``storage`` is the dtype that holds the packed bytes."""
        super().__init__(in_features, out_features, bias=False, device="meta")
        numel = in_features * out_features
        blocks = -(-numel // BLOCK_SIZE)
        packed = torch.empty(numel // (2 * storage.itemsize), 1, dtype=storage, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)
        nested = -(-blocks // NESTED_BLOCK_SIZE)
        for name, size, dtype in (
            ("absmax", blocks, torch.uint8),
            ("nested_absmax", nested, torch.int32),
            ("offset", 1, torch.int32),
        ):
            self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"), persistent=False)

    @classmethod
    def in_place_of(cls, linear: nn.Linear, storage: torch.dtype) -> NF4Linear:
        """The layer that a quantised ``linear`` becomes, still without values but for its bias."""
        return cls(linear.in_features, linear.out_features, bias=linear.bias, storage=storage)

    @classmethod
    def quantize(cls, linear: nn.Linear, storage: torch.dtype) -> NF4Linear:
        """Quantises a whole layer."""
        module = cls.in_place_of(linear, storage)
        packed, absmax = quantize_blocks(linear.weight.detach(), storage)
        module.weight = nn.Parameter(packed, requires_grad=False)
        module.set_scales(absmax)
        return module

    def set_scales(self, absmax: Tensor) -> None:
        """Takes [blocks] fp32 scales of the whole weight, and quantises them in turn.

        That needs all of them at once: their mean is subtracted first, and 256 of them share a scale.
        """
        self.offset = absmax.mean().reshape(1)
        self.absmax, nested = bnb.quantize_blockwise(absmax - self.offset, blocksize=NESTED_BLOCK_SIZE)
        self.nested_absmax, self.offset = nested.absmax.view(torch.int32), self.offset.view(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        y: Tensor = NF4Matmul.apply(x, self.weight, self.absmax, self.nested_absmax, self.offset, shape)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nf4, double_quantization=True"


def quantize_blocks(weights: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packs weights into NF4.

    Args:
        weights: any shape, a multiple of 64 elements; each 64 in a row are quantised without a look at the others.
        storage: dtype that holds the packed bytes.

    Returns:
        [elements / (2 * itemsize), 1] packed weights and [elements / 64] fp32, the largest magnitude of each block.
    """
    packed, state = bnb.quantize_4bit(
        weights, blocksize=BLOCK_SIZE, compress_statistics=False, quant_type="nf4", quant_storage=storage
    )
    return packed, state.absmax


class NF4Matmul(torch.autograd.Function):
    """Keeps only the packed weight for backward and dequantises it there once more; input gradients only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor,
        offset: Tensor,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.shape = shape
        # The parameter itself, not a view of it: a sharded strategy frees and refills its storage between the passes.
        ctx.save_for_backward(packed, absmax, nested_absmax, offset)
        return x @ dequantize(packed, absmax, nested_absmax, offset, shape, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, absmax, nested_absmax, offset = ctx.saved_tensors
        weight = dequantize(packed, absmax, nested_absmax, offset, ctx.shape, grad.dtype)
        return grad @ weight, None, None, None, None, None


def dequantize(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [out, in] in ``dtype`` from the parts described at :class:`NF4Linear`."""
    scales = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, nested_absmax.view(torch.float32), _scale_code(absmax), NESTED_BLOCK_SIZE, torch.float32
    )
    scales = scales + offset.view(torch.float32)
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, BLOCK_SIZE, "nf4", shape, dtype)
    return weight


_SCALE_CODES: dict[torch.device, Tensor] = {}


def _scale_code(absmax: Tensor) -> Tensor:
    """[256] fp32, what each quantised scale stands for: the same constant table for every layer."""
    if isinstance(absmax, FakeTensor):
        # The table is computed from values, which a trace has not; and a fake one must not stay in the cache.
        return absmax.new_empty(256, dtype=torch.float32)
    if absmax.device not in _SCALE_CODES:
        _SCALE_CODES[absmax.device] = bnb.create_dynamic_map().to(absmax.device)
    return _SCALE_CODES[absmax.device]
