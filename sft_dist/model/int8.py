"""Linear layers whose frozen weight is stored in 8 bits, a scale a row (LLM.int8(), arXiv 2208.07339, section 2).

The paper keeps large activations apart and multiplies in 8 bits, for inference. In training the weight is dequantised
and the product is made in the run's ``compute`` dtype: activations are not quantised, and there are no outliers.
"""

from __future__ import annotations

from typing import Self

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from sft_dist.model.quantized import QuantizedLinear


class Int8Linear(QuantizedLinear):
    """A byte a parameter; the packed weight is [out, in / bytes of storage], so that its rows are the weight's.

    Buffers:
        row_absmax: [out] int32, bits of the fp32 largest magnitude of each row, which 127 stands for.
    """

    kind = "int8"

    row_absmax: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: nn.Parameter | None, storage: torch.dtype) -> None:
        """An empty layer on the meta device; ``storage`` is the dtype that holds the bytes."""
        super().__init__(in_features, out_features, bias=False, device="meta")
        self._set_packed((out_features, in_features // storage.itemsize), storage, bias)
        self._declare(row_absmax=(out_features, torch.int32))

    @classmethod
    def in_place_of(cls, linear: nn.Linear, storage: torch.dtype) -> Self:
        return cls(linear.in_features, linear.out_features, bias=linear.bias, storage=storage)

    @staticmethod
    def indivisible(linear: nn.Linear, storage: torch.dtype) -> str | None:
        size = storage.itemsize
        return f"{linear.in_features} inputs, not a multiple of {size}" if linear.in_features % size else None

    @property
    def unit(self) -> int:
        return self.in_features

    def quantize_units(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        packed, absmax = quantize_rows(weights.view(-1, self.in_features), self.weight.dtype)
        return packed.flatten(), absmax

    def set_scales(self, absmax: Tensor) -> None:
        self.row_absmax = absmax.view(torch.int32)

    def stored(self) -> tuple[Tensor, ...]:
        return self.weight, self.row_absmax

    @staticmethod
    def dequantize(stored: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        packed, row_absmax = stored
        scales = row_absmax.view(torch.float32).unsqueeze(1) * (1.0 / 127.0)
        return packed.view(torch.int8).view(shape).to(dtype).mul_(scales)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"


def quantize_rows(weights: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """[rows, in / bytes of storage] packed and [rows] fp32 scales of [rows, in] ``weights``.

    Through fp16 whatever the dtype of ``weights``, because bitsandbytes does so, and others must find the same bytes.
    """
    quantized, absmax, _ = bnb.int8_vectorwise_quant(weights.to(torch.float16))
    return quantized.view(storage), absmax
