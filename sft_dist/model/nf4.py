"""Linear layers whose frozen weight is stored in NF4 (arXiv 2305.14314, section 3).

Made here with double quantisation; read from files also where the scales were left in fp32.
"""

from __future__ import annotations

from typing import Self

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from sft_dist.model.quantized import QuantizedLinear

# Weights that share one scale, and scales that share one scale of scales.
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256


class NF4Linear(QuantizedLinear):
    """Half a byte a parameter.

    Buffers:
        absmax: [blocks] uint8, quantised scales; without double quantisation int32, bits of the fp32 scales.
        nested_absmax: [ceil(blocks / 256)] int32, bits of the fp32 scales of scales.
        scale_code: [256] int32, bits of what each quantised scale stands for (fp32, before scale and offset).
        offset: [1] int32, bits of the fp32 mean of the scales.

    The last three are there with double quantisation only.
    """

    kind = "nf4"

    absmax: Tensor
    nested_absmax: Tensor
    scale_code: Tensor
    offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None,
        storage: torch.dtype,
        double_quantization: bool = True,
    ) -> None:
        """An empty layer on the meta device; ``storage`` is the dtype that holds the packed bytes."""
        super().__init__(in_features, out_features, bias=False, device="meta")
        numel = in_features * out_features
        blocks = -(-numel // BLOCK_SIZE)
        self.double_quantization = double_quantization
        self._set_packed((numel // (2 * storage.itemsize), 1), storage, bias)
        if double_quantization:
            self._declare(
                absmax=(blocks, torch.uint8),
                nested_absmax=(-(-blocks // NESTED_BLOCK_SIZE), torch.int32),
                scale_code=(256, torch.int32),
                offset=(1, torch.int32),
            )
        else:
            self._declare(absmax=(blocks, torch.int32))

    @classmethod
    def in_place_of(cls, linear: nn.Linear, storage: torch.dtype, *, double_quantization: bool = True) -> Self:
        return cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias,
            storage=storage,
            double_quantization=double_quantization,
        )

    @staticmethod
    def indivisible(linear: nn.Linear, storage: torch.dtype) -> str | None:
        numel = linear.in_features * linear.out_features
        return f"{numel} weights, not a multiple of {BLOCK_SIZE}" if numel % BLOCK_SIZE else None

    @property
    def unit(self) -> int:
        return BLOCK_SIZE

    def quantize_units(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        packed, absmax = quantize_blocks(weights, self.weight.dtype)
        return packed.flatten(), absmax

    def set_scales(self, absmax: Tensor) -> None:
        """Takes [blocks] fp32 scales of the whole weight, and quantises them in turn.

        That needs all of them at once: their mean is subtracted first, and 256 of them share a scale.
        """
        self.offset = absmax.mean().reshape(1)
        self.absmax, nested = bnb.quantize_blockwise(absmax - self.offset, blocksize=NESTED_BLOCK_SIZE)
        self.nested_absmax, self.offset = nested.absmax.view(torch.int32), self.offset.view(torch.int32)
        self.scale_code = nested.code.view(torch.int32)

    def stored(self) -> tuple[Tensor, ...]:
        if not self.double_quantization:
            return self.weight, self.absmax
        return self.weight, self.absmax, self.nested_absmax, self.scale_code, self.offset

    @staticmethod
    def dequantize(stored: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        packed, absmax, *nested = stored
        scales = absmax.view(torch.float32) if not nested else _dequantize_scales(absmax, *nested)
        # A block a row: on a CPU bitsandbytes starts a block with each row, also where none started when quantising.
        blocks = (shape[0] * shape[1] // BLOCK_SIZE, BLOCK_SIZE)
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, BLOCK_SIZE, "nf4", blocks, dtype)
        return weight.view(shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nf4, double_quantization={self.double_quantization}"


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


def _dequantize_scales(absmax: Tensor, nested_absmax: Tensor, scale_code: Tensor, offset: Tensor) -> Tensor:
    """[blocks] fp32"""
    scales = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax,
        nested_absmax.view(torch.float32),
        scale_code.view(torch.float32),
        NESTED_BLOCK_SIZE,
        torch.float32,
    )
    return torch.add(scales, offset.view(torch.float32))
