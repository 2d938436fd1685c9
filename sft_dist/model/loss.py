"""The one loss: the sum of the cross-entropies of the supervised tokens, without ever holding all logits.

Logits exist only for supervised positions and only a chunk at a time. The gradients are made in the forward pass, in
the same sweep over the chunks, as Liger Kernel does (Hsu et al. 2024, arXiv 2410.10989): backward only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft_dist.model.cpu_shapes import add_mm, mm, product

# Bytes of fp32 logits alive at a time. A CPU gains nothing from more: what does not stay in its caches is slower.
CHUNK_BYTES = 256 * 2**20
CPU_CHUNK_BYTES = 16 * 2**20
# Elements of a gradient that are scaled at a time on a CPU.
CPU_SCALED_NUMEL = 1 << 18


class LinearCrossEntropy(torch.autograd.Function):
    """sum over n of -log softmax(hidden[n] @ weight.T)[labels[n]].

    With ``rows`` [k, h] the weight is read as if its rows ``row_ids`` [k] were these. With ``smoothing`` s the target
    is 1 - s of the label and s / V of each of the V ids, as ``label_smoothing`` of torch's ``cross_entropy``.
    Products are made of a multiple of ``row_multiple`` rows: what lacks is filled with zeros, which add nothing to a
    gradient, and their losses are left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        row_ids: Tensor | None,
        labels: Tensor,
        chunk_rows: int,
        row_multiple: int,
        with_grad: bool,
        smoothing: float,
    ) -> Tensor:
        # needs_input_grad says what requires grad, also under no_grad: the caller's grad mode decides.
        needs_hidden, needs_weight, needs_rows = (needs and with_grad for needs in ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_rows: Tensor | None = None
        for start in range(0, hidden.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            h, target = hidden[chunk], labels[chunk, None]
            count = h.shape[0]
            if lacking := -count % row_multiple:
                h, target = F.pad(h, (0, 0, 0, lacking)), F.pad(target, (0, 0, 0, lacking))
            products = mm(h, weight.T)
            if rows is not None and row_ids is not None:
                products.index_copy_(1, row_ids, mm(h, rows.T))
            logits = products.float()
            del products
            # Each number is read for the last time when its place is written. Not asked of the device: a plan's trace
            # of a GPU is on tensors of the CPU.
            in_place = {"out": logits} if row_multiple > 1 else {}
            log_probs = torch.ops.aten._log_softmax(logits, 1, False, **in_place)
            del logits, in_place
            loss -= (1 - smoothing) * log_probs[:count].gather(1, target[:count]).sum()
            if smoothing:
                loss -= smoothing * log_probs[:count].mean(dim=1).sum()
            if not (needs_hidden or needs_weight or needs_rows):
                continue
            grad_logits = log_probs.exp_()
            del log_probs
            grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, smoothing - 1.0))
            if smoothing:
                grad_logits.sub_(smoothing / weight.shape[0])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_products = grad_logits[:, :0]
            if row_ids is not None:
                grad_products = grad_logits.index_select(1, row_ids)
                grad_logits.index_fill_(1, row_ids, 0)
            if grad_hidden is not None:
                grad_h = product(grad_logits, weight, None if lacking else grad_hidden[chunk])
                if rows is not None:
                    add_mm(grad_h, grad_products, rows)
                if lacking:
                    grad_hidden[chunk] = grad_h[:count]
            is_only = hidden.shape[0] <= chunk_rows
            if needs_weight:
                grad_weight = _added(grad_weight, mm(grad_logits.T, h), is_only=is_only)
            if needs_rows:
                grad_rows = _added(grad_rows, mm(grad_products.T, h), is_only=is_only)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        if needs_rows and rows is not None and grad_rows is None:
            grad_rows = torch.zeros_like(rows)
        ctx.in_parts = row_multiple > 1
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_rows is None else grad_rows.to(weight.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = (None if g is None else _scaled(g, grad, in_parts=ctx.in_parts) for g in ctx.saved_tensors)
        return *grads, None, None, None, None, None, None


def _added(total: Tensor | None, part: Tensor, *, is_only: bool) -> Tensor:
    """A gradient with one more chunk's part. Rows of a chunk are few and many chunks are added: the sum is in fp32."""
    if is_only:
        return part
    return part.float() if total is None else total.add_(part)


def _scaled(gradient: Tensor, factor: Tensor, *, in_parts: bool) -> Tensor:
    """gradient * factor, the factor in fp32: rounded to bf16 it would shift every gradient of a step by up to 2^-8."""
    # One dimension, because a product with a zero-dimensional tensor takes the dtype of the other one first.
    factor = factor.reshape(1)
    if not in_parts:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient))
    # A CPU makes an fp32 copy of what it multiplies: of as much as its caches hold.
    for part in gradient.view(-1).split(CPU_SCALED_NUMEL):
        torch.mul(part, factor, out=part)
    return gradient


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    row_ids: Tensor | None = None,
    chunk_rows: int | None = None,
    row_multiple: int = 1,
    smoothing: float = 0.0,
) -> Tensor:
    """Summed cross-entropy in fp32, a scalar.

    Args:
        hidden: [N, h] hidden states that predict the labels; N may be 0, the result is then 0 and still has a graph.
        weight: [V, h] output layer.
        labels: [N] int64.
        rows, row_ids: [k, h] that stand in for the rows [k] of ``weight``; both or neither.
        chunk_rows: rows of logits alive at a time; default: as many as fit ``CHUNK_BYTES``.
        row_multiple: products are made of so many rows at a time, or a multiple of it; more than 1 where bf16 is
            multiplied on a CPU (``cpu_shapes``).
        smoothing: share of the target that all ids have in equal parts.
    """
    if chunk_rows is None:
        chunk_bytes = CPU_CHUNK_BYTES if row_multiple > 1 else CHUNK_BYTES
        chunk_rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    chunk_rows += -chunk_rows % row_multiple
    result: Tensor = LinearCrossEntropy.apply(
        hidden, weight, rows, row_ids, labels, chunk_rows, row_multiple, torch.is_grad_enabled(), smoothing
    )
    return result


class LossHead(nn.Linear):
    """The model's output layer, called with labels for the loss and without them for logits.

    It stays a module with the layer's own name and weight, because FSDP2 and ZeRO-3 gather a weight when its module is
    called, and a tied embedding must stay tied.

    Attributes:
        label_smoothing: of the loss in training mode.
        row_multiple: see ``linear_cross_entropy_sum``.
    """

    label_smoothing: float = 0.0
    row_multiple: int = 1

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LossHead:
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy_sum(
            hidden, self.weight, labels, row_multiple=self.row_multiple, smoothing=self.smoothing
        )

    @property
    def smoothing(self) -> float:
        return self.label_smoothing if self.training else 0.0
