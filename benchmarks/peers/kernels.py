"""Stand-ins for fused kernels: autograd functions that allocate and keep what a Triton kernel does.

Sources: unsloth ``kernels/{rms_layernorm,rope_embedding,swiglu,cross_entropy_loss,fast_lora}.py`` as carried by
fms-acceleration's fused-ops-and-kernels plugin, and Liger-Kernel ``ops/*.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class FusedRmsNorm(Function):
    """Keeps its input and one fp32 number a row; backward writes into the gradient that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        _, weight, _ = ctx.saved_tensors
        return grad, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class FusedRope(Function):
    """Rotates in place, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class FusedSwiglu(Function):
    """Keeps gate and up, and backward writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up


class FusedCrossEntropy(Function):
    """Keeps the logits, and backward writes their gradient over them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        rows = logits.shape[0]
        logsumexp = logits.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(logits, logsumexp)
        return logits.new_empty(rows, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits, _ = ctx.saved_tensors
        return logits


class CompiledCrossEntropy(Function):
    """What inductor makes of upcast and cross-entropy: keeps the logits as they came, and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        rows = logits.shape[0]
        ctx.save_for_backward(logits, logits.new_empty(rows, 1, dtype=torch.float32))
        return logits.new_empty(rows, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits, _ = ctx.saved_tensors
        return torch.empty_like(logits)


class FusedLinearCrossEntropy(Function):
    """Liger: logits of a chunk of tokens at a time, their gradient at once; keeps the gradients of input and weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunks_in_fp32: bool) -> Tensor:
        tokens, width = hidden.shape
        vocabulary = weight.shape[0]
        parts = -(-vocabulary // width)
        chunk = 1 << (-(-tokens // parts) - 1).bit_length()
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_hidden = torch.zeros_like(hidden)
        losses = hidden.new_zeros(tokens, dtype=torch.float32)
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t().to(part.dtype)
            if chunks_in_fp32:
                logits = logits.float().to(part.dtype)
                logits = logits * 1.0
            grad_hidden[start : start + chunk] = logits @ weight.to(logits.dtype)
            if grad_weight is not None:
                grad_weight += logits.t() @ part
            del logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None


class FusedLora(Function):
    """unsloth's LoRA_QKV and LoRA_W: some linear layers of one input, which keeps it and every dropped copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[Any], *adapters: Tensor) -> tuple[Tensor, ...]:
        outputs, dropped = [], []
        for i, layer in enumerate(layers):
            out = layer.base.product(x)
            seen = torch.native_dropout(x, layer.dropout, True)[0] if layer.dropout else x
            a, b = adapters[2 * i], adapters[2 * i + 1]
            out += (seen @ a.t().to(x.dtype)) @ b.t().to(x.dtype)
            outputs.append(out)
            dropped.append(seen)
        ctx.layers = layers
        ctx.save_for_backward(x, *adapters, *dropped)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layers = ctx.layers
        x, *rest = ctx.saved_tensors
        adapters, dropped = rest[: 2 * len(layers)], rest[2 * len(layers) :]
        gradients = [torch.empty_like(a) for a in adapters]
        width = x.shape[-1]
        whole = x.view(-1, width) if len(layers) > 1 else torch.empty_like(x).view(-1, width)
        for i, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
            flat = grad.reshape(-1, grad.shape[-1])
            if i or len(layers) == 1:  # the first product is written over the input
                part = layer.base.product_transposed(flat)
                whole += part
                del part
            correction = (flat @ adapters[2 * i + 1].to(x.dtype)) @ adapters[2 * i].to(x.dtype)
            mask = dropped[i].view(-1, width) != 0
            whole += mask * correction
            del correction, mask
        return whole.view(x.shape), None, *gradients


class FusedMlpLora(Function):
    """unsloth's LoRA_MLP: keeps input, gate and up; backward works in place on them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[Any], *adapters: Tensor) -> Tensor:
        gate, up, down = layers
        e, g = _with_adapter(x, gate, *adapters[:2]), _with_adapter(x, up, *adapters[2:4])
        h = torch.empty_like(e)
        out = _with_adapter(h, down, *adapters[4:])
        ctx.layers = layers
        ctx.save_for_backward(x, e, g, *adapters)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, e, _g, *adapters = ctx.saved_tensors
        gate, up, down = ctx.layers
        flat = grad.reshape(-1, grad.shape[-1])
        inner = down.base.product_transposed(flat)
        inner += (flat @ adapters[5].to(x.dtype)) @ adapters[4].to(x.dtype)
        gradients = [torch.empty_like(a) for a in adapters]
        whole = x.view(-1, x.shape[-1])
        e_flat = e.view(-1, e.shape[-1])
        for layer, (a, b) in ((up, adapters[2:4]), (gate, adapters[:2])):
            whole += layer.base.product_transposed(e_flat)
            whole += (e_flat @ b.to(x.dtype)) @ a.to(x.dtype)
        return whole.view(x.shape), None, *gradients


def _with_adapter(x: Tensor, layer: Any, a: Tensor, b: Tensor) -> Tensor:
    out = layer.base.product(x)
    out += (x @ a.t().to(x.dtype)) @ b.t().to(x.dtype)
    return out


class RmsNorm(nn.Module):
    """Takes the place of a Transformers RMSNorm."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return FusedRmsNorm.apply(x, self.weight)
