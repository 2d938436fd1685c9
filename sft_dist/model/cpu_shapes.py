"""Products of bf16 on a CPU: few shapes instead of many, and fp32 where it has no instructions for bf16.

They are oneDNN's, which builds a kernel for every shape that it has not seen. That takes some 10 ms, many times what a
product of a thousand tokens takes, and a packed batch has other numbers of tokens, of supervised positions and of
tokens in a row than the one before it. So each of them is filled up to a multiple of ``MULTIPLE``.

Of some shapes it makes the product on one thread, however many there are: :func:`product` halves those.

Without AVX-512 they are not oneDNN's, and torch's own loops are 5 to 100 times as slow as a product of fp32: there
:func:`mm` and :func:`add_mm` multiply in fp32 and round the result, which is what the instructions do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from sft_dist.data.batch import MicroBatch

MULTIPLE = 64

# Sizes of products [m, k] by [k, n] that oneDNN 3.11 was seen to make on one thread: m below, k from, n within.
ONE_THREAD_M, ONE_THREAD_K, ONE_THREAD_N = 2048, 1024, range(512, 1024)


def multiple_for(device: torch.device, compute: torch.dtype) -> int:
    """What numbers of tokens are filled up to a multiple of."""
    return MULTIPLE if device.type == "cpu" and compute == torch.bfloat16 else 1


def filled_up(number: int, multiple: int = MULTIPLE) -> int:
    """The next multiple."""
    return number + -number % multiple


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it that torch uses."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _goes_by_fp32(a: Tensor, b: Tensor) -> bool:
    # A plan's trace of a GPU is on fake tensors of the CPU.
    is_here = a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and not isinstance(a, FakeTensor)
    return is_here and not multiplies_bf16()


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, for [m, k] by [k, n]."""
    if _goes_by_fp32(a, b):
        result = torch.mm(a.float(), b.float())
        return result.to(a.dtype) if out is None else out.copy_(result)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def add_mm(total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, in_place: bool = True) -> Tensor:
    """``total`` + alpha a @ b, for [m, k] by [k, n]."""
    if _goes_by_fp32(a, b):
        return (total if in_place else total.clone()).add_(torch.mm(a.float(), b.float()), alpha=alpha)
    return total.addmm_(a, b, alpha=alpha) if in_place else torch.addmm(total, a, b, alpha=alpha)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, for [m, k] by [k, n]; by halves of the columns where a CPU would make it on one thread."""
    (m, k), n = a.shape, b.shape[1]
    is_onednn = a.dtype == torch.bfloat16 and a.device.type == "cpu" and multiplies_bf16()
    if not is_onednn or m >= ONE_THREAD_M or k < ONE_THREAD_K or n not in ONE_THREAD_N or torch.get_num_threads() == 1:
        return mm(a, b, out)
    if out is None:
        out = a.new_empty(m, n)
    for columns in (slice(0, n // 2), slice(n // 2, n)):
        torch.mm(a, b[:, columns], out=out[:, columns])
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + bias for x [n, in] and W [out, in]."""
    if bias is None:
        return product(x, weight.T)
    if _goes_by_fp32(x, weight):
        return torch.addmm(bias.float(), x.float(), weight.T.float()).to(x.dtype)
    return F.linear(x, weight, bias)


class Product(torch.autograd.Function):
    """:func:`linear`, with all of its products by :func:`product` or :func:`mm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if needs_x else None,
            mm(grad.T, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class SplitLinear(nn.Linear):
    """A linear layer whose products are on all threads, or those of fp32."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Product.apply(x.flatten(0, -2), self.weight, self.bias)
        return result.unflatten(0, x.shape[:-1])


def split_products(model: nn.Module) -> None:
    """For a model that multiplies bf16 on a CPU: its plain linear layers become ``SplitLinear``.

    With instructions for bf16 those without a bias alone: the others are oneDNN's whole.
    """
    for module in model.modules():
        if type(module) is nn.Linear and (module.bias is None or not multiplies_bf16()):
            module.__class__ = SplitLinear


def filled(batch: MicroBatch, multiple: int) -> MicroBatch:
    """``batch`` with a multiple of so many tokens: what lacks is a segment of its own, without labels.

    A part of a batch stays as it is: the ranks that have the others would have to fill in as many.
    """
    lacking = filled_up(batch.num_tokens, multiple) - batch.num_tokens
    if not lacking or batch.split is not None:
        return batch
    positions = torch.arange(lacking, device=batch.position_ids.device)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, lacking)),
        position_ids=torch.cat([batch.position_ids, positions[None]], dim=1),
        cu_seqlens=F.pad(batch.cu_seqlens, (0, 1), value=batch.num_tokens + lacking),
        seq_lens=(*batch.seq_lens, lacking),
    )
