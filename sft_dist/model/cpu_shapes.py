"""Few shapes instead of many, for products of bf16 on a CPU.

They are oneDNN's, which builds a kernel for every shape that it has not seen. That takes some 10 ms, many times what a
product of a thousand tokens takes, and a packed batch has other numbers of tokens, of supervised positions and of
tokens in a row than the one before it. So each of them is filled up to a multiple of ``MULTIPLE``.

Of some shapes it makes the product on one thread, however many there are: :func:`product` halves those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, for [m, k] by [k, n]; by halves of the columns where a CPU would make it on one thread."""
    (m, k), n = a.shape, b.shape[1]
    is_onednn = a.dtype == torch.bfloat16 and a.device.type == "cpu"
    if not is_onednn or m >= ONE_THREAD_M or k < ONE_THREAD_K or n not in ONE_THREAD_N or torch.get_num_threads() == 1:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty(m, n)
    for columns in (slice(0, n // 2), slice(n // 2, n)):
        torch.mm(a, b[:, columns], out=out[:, columns])
    return out


class Product(torch.autograd.Function):
    """x W' for x [n, in] and W [out, in], with both of its products by :func:`product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return product(grad, weight) if needs_x else None, grad.T @ x if needs_weight else None


class SplitLinear(nn.Linear):
    """A linear layer without bias whose products are on all threads."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Product.apply(x.flatten(0, -2), self.weight)
        return result.unflatten(0, x.shape[:-1])


def split_products(model: nn.Module) -> None:
    """For a model that multiplies bf16 on a CPU: its plain linear layers become ``SplitLinear``."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
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
