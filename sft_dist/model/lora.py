"""Plain LoRA on a frozen linear layer as one node of the graph (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    y = x W' + bias + scaling * dropout(x) A' B'        x [..., in], W [out, in], A [r, in], B [out, r]; ' transposes

The layers, their parameters' names and what is saved stay PEFT's; forward and backward are ours. PEFT's composition of
operators makes four tensors of y's size where one is enough, keeps a dropped copy of the input for every layer that
reads it, and runs the product with W once more when a checkpointed block is recomputed only for what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sft_dist.model.cpu_shapes import add_mm, linear, mm, product
from sft_dist.model.int8 import Int8Linear
from sft_dist.model.nf4 import NF4Linear
from sft_dist.model.quantized import Dequantize, QuantizedLinear, QuantizedMatmul
from sft_dist.model.token_rows import ReadsTokenRows

ADAPTER = "default"


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer with our forward and backward.

    Its forward reads the parameters of the modules inside it without calling them: see :func:`readers`.

    Attributes:
        base_product_is_kept: for the recomputation, by selective checkpointing: nothing is added to it in place.
    """

    base_product_is_kept = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or self.active_adapters != [ADAPTER]:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        dropout = self.lora_dropout[ADAPTER]
        return lora_linear(
            x,
            self.get_base_layer(),
            self.lora_A[ADAPTER].weight,
            self.lora_B[ADAPTER].weight,
            scaling=self.scaling[ADAPTER],
            dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
            in_place=not self.base_product_is_kept,
        )


class Magnitude(nn.Module):
    """DoRA's length of each row of a weight, where PEFT keeps it. It is read, not called."""

    def __init__(self, out_features: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, dtype=like.dtype, device=like.device))


class DoraLinear(LoraLinear):
    """A weight's rows are turned by the adapter and have a trained length (Liu et al. 2024, arXiv 2402.09353).

        y = m / |V| * x V' + bias,  V = W + scaling * B A  [out, in],  |V| [out] the lengths of its rows

    |V| counts as constant in backward (section 4.3 there). As in PEFT, dropout is on the input of what the adapter
    changes: (m / |V| - 1) * x W' and the adapter's own part.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, scaling = self.get_base_layer(), self.scaling[ADAPTER]
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        factor = self.lora_magnitude_vector[ADAPTER].weight / row_lengths(base, a, b, scaling)
        dropped = self.lora_dropout[ADAPTER](x)
        straight = base_product(base, x)
        turned = straight if dropped is x else base_product(base, dropped)
        adapter = F.linear(F.linear(dropped, a), b) * scaling
        y = straight + (factor - 1) * turned + factor * adapter
        return y if base.bias is None else y + base.bias


def row_lengths(base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """[out] Euclidean length of each row of W + scaling * B A, without a graph."""
    with torch.no_grad():
        return torch.linalg.vector_norm(dense_weight(base, a.dtype) + scaling * (b @ a), dim=1)


def base_product(base: nn.Linear, x: Tensor) -> Tensor:
    """x W' without bias."""
    if isinstance(base, QuantizedLinear):
        shape = (base.out_features, base.in_features)
        result: Tensor = QuantizedMatmul.apply(x, base.dequantize, shape, *base.stored())
        return result
    return F.linear(x, base.weight)


def dense_weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """[out, in] of a dense or a quantised layer."""
    if isinstance(base, QuantizedLinear):
        return base.dequantize(base.stored(), (base.out_features, base.in_features), dtype)
    return base.weight


def add_magnitudes(model: nn.Module) -> None:
    """Makes DoRA layers of all layers that ``fuse_lora`` has taken."""
    for module in list(model.modules()):
        if type(module) is LoraLinear:
            module.lora_magnitude_vector[ADAPTER] = Magnitude(module.out_features, module.lora_A[ADAPTER].weight)
            module.__class__ = DoraLinear


def fuse_lora(model: nn.Module) -> None:
    """Gives every plain LoRA layer on a dense or quantised linear layer our forward; other PEFT layers keep theirs.

    The object keeps its identity, parameters and hooks and changes its class, as ``fully_shard`` does it.
    """
    for module in model.modules():
        if type(module) is PeftLinear and _is_plain(module):
            module.__class__ = LoraLinear


def _is_plain(layer: Any) -> bool:
    """A variant (DoRA and others) computes something else; ``lora_bias`` adds a parameter that we do not read."""
    return (
        type(layer.get_base_layer()) in (nn.Linear, NF4Linear, Int8Linear)
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


def readers(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every module that runs on its own, with the modules whose parameters its forward reads: mostly itself alone.

    What a strategy does with parameters while their module runs (cast, gather), it must do while the reader runs.
    """
    reads_inside = (LoraLinear, ReadsTokenRows)
    inside = {id(m) for reader in model.modules() if isinstance(reader, reads_inside) for m in reader.modules()}
    for module in model.modules():
        if isinstance(module, reads_inside):
            yield module, list(module.modules())
        elif id(module) not in inside:
            yield module, [module]


def lora_linear(
    x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, *, scaling: float, dropout: float = 0.0, in_place: bool = True
) -> Tensor:
    """[..., out] in ``x``'s dtype, that of A and B too.

    Args:
        base: an ``nn.Linear`` or ``QuantizedLinear`` with a frozen weight; it is read, not called.
        dropout: probability that an element of the adapter's input is zeroed. Draws the same numbers as ``F.dropout``.
        in_place: the adapter's part is added to the base's product, not to a copy of it.
    """
    assert not base.weight.requires_grad, "the weight under an adapter is frozen: it would get no gradient here"
    stored: tuple[Tensor, ...] = (base.weight,)
    dequantize: Dequantize = _dense
    if isinstance(base, QuantizedLinear):
        stored, dequantize = base.stored(), base.dequantize
    shape = (base.out_features, base.in_features)
    with torch.no_grad():
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        h = mm(dropped.reshape(-1, a.shape[1]), a.T).view(*x.shape[:-1], a.shape[0])
        del dropped

    def value() -> Tensor:
        weight = dequantize(stored, shape, x.dtype)
        read = x.reshape(-1, shape[1])
        y = linear(read, weight, base.bias)
        total = add_mm(y, h.reshape(-1, h.shape[-1]), b.T, alpha=scaling, in_place=in_place)
        return total.view(*x.shape[:-1], shape[0])

    place = LoraMatmul.apply(x, h, mask, a, b, base.bias, scaling, dropout, dequantize, shape, *stored)
    result: Tensor = _FillIn.apply(place, value)
    return result


class LoraMatmul(torch.autograd.Function):
    """Keeps what backward needs and computes the gradients. Its output has y's shape and no memory.

    The value comes after it, because the recomputation of a checkpointed block ends when the last tensor has been kept
    again: the block's last linear layer, the largest of a Llama block, then need not run once more.

    Kept: x itself, which the layers that share it keep together; h = dropout(x) A' [..., r]; the dropout mask, one byte
    an element; and the parameters themselves, no views of them: a sharded strategy frees and refills their storage
    between the passes. A dequantised weight is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        mask: Tensor | None,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout: float,
        dequantize: Dequantize,
        shape: tuple[int, int],
        *stored: Tensor,
    ) -> Tensor:
        ctx.scaling, ctx.keep_scale = scaling, 1 / (1 - dropout)
        ctx.dequantize, ctx.shape = dequantize, shape
        ctx.save_for_backward(x, h, mask, a, b, *stored)
        return x.new_empty(()).expand(*x.shape[:-1], shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, mask, a, b, *stored = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:6]
        g = grad.reshape(-1, grad.shape[-1])
        g_h = mm(g, b).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if needs_b:
            # [r, out] first: CPUs are slower at products with few columns than at those with few rows.
            grad_b = mm(h.reshape(-1, h.shape[-1]).T, g).mul_(ctx.scaling).T
        if needs_a:
            # What was not dropped is scaled where it is small: in the product.
            read = x if mask is None else x * mask
            grad_a = mm(g_h.T, read.reshape(-1, x.shape[-1])).mul_(ctx.keep_scale)
            del read
        if needs_x:
            grad_x = product(g, ctx.dequantize(tuple(stored), ctx.shape, grad.dtype))
            if mask is None:
                add_mm(grad_x, g_h, a)
            else:
                grad_x.add_(mm(g_h, a).mul_(mask.reshape_as(grad_x)), alpha=ctx.keep_scale)
            grad_x = grad_x.view(x.shape)
        grad_bias = g.sum(0) if needs_bias else None
        return grad_x, None, None, grad_a, grad_b, grad_bias, *(None for _ in range(4 + len(stored)))


class _FillIn(torch.autograd.Function):
    """The value of a tensor that has its place in the graph already."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, value: Callable[[], Tensor]) -> Tensor:
        return value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _dense(stored: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A weight that is not quantised."""
    return stored[0]
