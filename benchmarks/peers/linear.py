"""Linear layers of other stacks: quantised to 4 bits as bitsandbytes does it, and with PEFT's adapters beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

# bitsandbytes: blocks of 64 numbers with an fp32 scale; doubly quantised, 1 byte and an fp32 scale for 256 of those.
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256


class Dense(nn.Linear):
    """A layer of the base; the two products are for kernels that write their own backward."""

    def product(self, x: Tensor) -> Tensor:
        return x @ self.weight.t().to(x.dtype)

    def product_transposed(self, grad: Tensor) -> Tensor:
        return grad @ self.weight.to(grad.dtype)


class _MatMul4Bit(Function):
    """Dequantises for the product, and again in backward; before 0.42 bitsandbytes kept the input for nothing,
    and dequantised to fp16 whatever the product was in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        if layer.keeps_input:
            ctx.save_for_backward(x)
        return F.linear(x, layer.dequantize(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grad, ctx.layer.dequantize(grad)), None


class Linear4bit(nn.Module):
    """bitsandbytes ``Linear4bit``: computes in ``compute_dtype`` and answers in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, *, nested: bool, compute_dtype: torch.dtype, bias: bool,
                 keeps_input: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.keeps_input = keeps_input
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        numel = in_features * out_features
        scales = -(-numel // NF4_BLOCK)
        self.nested_scales = scales if nested else 0
        # Not Parameters: nothing differentiates them, and sharding counts them apart.
        self.register_buffer("packed", torch.empty(-(-numel // 2), dtype=torch.uint8, device="meta"))
        if nested:
            self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"))
            self.register_buffer("outer", torch.empty(-(-scales // NF4_NESTED_BLOCK) + 256 + 16, device="meta"))
        else:
            self.register_buffer("scales", torch.empty(scales + 16, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device="meta"), False) if bias else None

    def dequantize(self, like: Tensor) -> Tensor:
        scales = like.new_empty(self.nested_scales, dtype=torch.float32) if self.nested_scales else None
        dtype = torch.float16 if self.keeps_input else like.dtype
        weight = like.new_empty(self.out_features, self.in_features, dtype=dtype)
        del scales
        return weight.to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            out = _MatMul4Bit.apply(x.to(self.compute_dtype), self)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        return x @ self.dequantize(x).t()

    def product_transposed(self, grad: Tensor) -> Tensor:
        return grad @ self.dequantize(grad)


class LoraLinear(nn.Module):
    """PEFT's ``lora.Linear`` and ``lora.bnb.Linear4bit``, forward line by line as far as it allocates."""

    def __init__(self, base: Any, *, r: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.dropout = base, dropout
        self.lora_A = nn.Linear(base.in_features, r, bias=False, dtype=dtype, device="meta")
        self.lora_B = nn.Linear(r, base.out_features, bias=False, dtype=dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        expected = result.dtype
        quantised = isinstance(self.base, Linear4bit)
        if quantised:
            result = result.clone()
        autocast = torch.is_autocast_enabled("cpu")
        if not (quantised and autocast):
            x = x.to(self.lora_A.weight.dtype)
        if self.dropout and self.training:
            x = torch.native_dropout(x, self.dropout, True)[0]
        output = self.lora_B(self.lora_A(x)) * 2.0
        if quantised and not autocast:
            output = output.to(expected)
        result = result + output
        return result if quantised else result.to(expected)
