"""Causal attention over packed segments on a CPU, as an operator with a backward of its own.

Forward is torch's flash attention for CPUs, a segment at a time. Its backward there makes its products in small blocks
of fp32, whatever their inputs are; :func:`_by_products` makes the same gradients by whole products of bf16 with sums in
fp32, about twice as fast, and holds the probabilities of a block of queries for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_dist.model.cpu_shapes import filled_up

# Tokens of a segment up to which gradients are made by products: beyond, flash attention's are faster.
MAX_BY_PRODUCTS = 1024
# Queries of a segment whose probabilities are held at a time.
BLOCK = 256


@torch.library.custom_op("sft_dist::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: Sequence[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each segment.

    Args:
        query: [T, heads, d].
        key, value: [T, kv_heads, d]; heads is a multiple of kv_heads.
        seq_lens: lengths of the segments, summing to T.
        scale: factor of the scores.
        window: tokens a query sees, itself included; 0: all before it.

    Returns:
        output [T, heads, d] and log-sum-exp of the scores [heads, T] in fp32.
    """
    out = torch.empty_like(query)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    start = 0
    for length in seq_lens:
        stop = start + length
        filled = length if query.dtype == torch.float32 else filled_up(length)
        q, k, v = (_of_segment(t, start, stop, filled, query, key) for t in (query, key, value))
        o, segment_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, window == 0, attn_mask=window_mask(filled, window, q), scale=scale
        )
        out[start:stop] = o.flatten(0, 1)[:, :length].transpose(0, 1)
        lse[:, start:stop] = segment_lse.flatten(0, 1)[:, :length]
        start = stop
    return out, lse


@packed_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: Sequence[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("sft_dist::packed_attention_backward", mutates_args=(), device_types="cpu")
def packed_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seq_lens: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of :func:`packed_attention`, in their shapes."""
    inputs = grad, query, key, value, out
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    # [T, heads, 1], for products only
    share = (grad.float() * out).sum(-1, keepdim=True) if query.dtype == torch.bfloat16 else None
    for start, stop in pairwise(accumulate(seq_lens, initial=0)):
        segment = slice(start, stop)
        if share is not None and stop - start <= MAX_BY_PRODUCTS:
            of_tokens = grad, query, key, value, lse.T.unsqueeze(-1), share
            parts = _by_products(
                *(_wide(each[segment], key.shape[1]) for each in of_tokens), scale=scale, window=window
            )
        else:
            parts = _by_flash_attention(inputs, lse, start, stop, scale, window)
        for whole, part in zip(grads, parts, strict=True):
            whole[segment] = part.flatten(0, 1)[:, : stop - start].transpose(0, 1)
    return grads


@packed_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    seq_lens: Sequence[int], scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.seq_lens, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = packed_attention_backward(grad, *ctx.saved_tensors, ctx.seq_lens, ctx.scale, ctx.window)
    return *grads, None, None, None


packed_attention.register_autograd(_backward, setup_context=_save)


def _of_segment(x: Tensor, start: int, stop: int, filled: int, query: Tensor, key: Tensor) -> Tensor:
    """Of [T, heads or kv_heads, d]: [kv_heads, heads / kv_heads, filled, d], with zeros behind the segment.

    A key or value head is not copied for the query heads that share it.
    """
    x = x[start:stop]
    if filled > x.shape[0]:
        x = F.pad(x, (0, 0, 0, 0, 0, filled - x.shape[0]))
    shared = key.shape[1]
    return x.transpose(0, 1).unflatten(0, (shared, -1)).expand(-1, query.shape[1] // shared, -1, -1)


def _by_flash_attention(
    inputs: tuple[Tensor, ...], lse: Tensor, start: int, stop: int, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one segment's query, key and value: [kv_heads, 1 or those that share a head, filled, d]."""
    _, query, key, *_ = inputs
    length = stop - start
    filled = length if query.dtype == torch.float32 else filled_up(length)
    g, q, k, v, o = (_of_segment(t, start, stop, filled, query, key) for t in inputs)
    lse = lse[:, start:stop]
    if filled > length:
        lse = F.pad(lse, (0, filled - length))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, o, lse.unflatten(0, q.shape[:2]).contiguous(), 0.0, window == 0,
        attn_mask=window_mask(filled, window, q), scale=scale,
    )  # fmt: skip
    # Each query head has a gradient of the key or value head that it shares; their sum is the head's.
    grad_key, grad_value = (each.sum(1, keepdim=True) if each.shape[1] > 1 else each for each in grads[1:])
    return grads[0], grad_key, grad_value


def _wide(x: Tensor, kv_heads: int) -> Tensor:
    """[t, heads or kv_heads, d] -> [kv_heads, 1 or more, filled t, d] in fp32, with zeros behind the segment."""
    length, heads, size = x.shape
    wide = x.new_empty((heads, filled_up(length), size), dtype=torch.float32)
    wide[:, :length], wide[:, length:] = x.transpose(0, 1), 0
    return wide.unflatten(0, (kv_heads, -1))


def _by_products(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, share: Tensor, *, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one segment, by blocks of its queries (Dao 2023, arXiv 2307.08691, algorithm 2).

    With S = scale Q K^T, P = exp(S - lse) and D the sum of grad times output over a head's dimensions:

        dV = P^T grad;  dS = P (grad V^T - D);  dQ = scale dS K;  dK = scale dS^T Q

    Query heads that share a key are more rows of the same products, which add up what they give to the key's gradient.

    Args:
        grad, query: [kv_heads, shares, t, d] in fp32, whose products may round to bf16.
        key, value: [kv_heads, 1, t, d].
        lse, share: [kv_heads, shares, t, 1]; share is D above.

    Returns:
        Those of query, key and value, in their shapes.
    """
    kv_heads, shares, length, size = query.shape
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    # Two for all blocks: allocated anew, each would be pages that the system has to fill with zeros.
    held = query.new_empty(2, kv_heads * shares * min(BLOCK, length) * length)
    minus_lse = -lse
    with _products_in_bf16():
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            first = max(0, start - window + 1) if window else 0
            rows, keys = slice(start, stop), slice(first, stop)
            shape = torch.Size((kv_heads, shares, stop - start, stop - first))
            probabilities, score_grads = (each[: shape.numel()].view(shape) for each in held)
            p, ds = probabilities.flatten(1, 2), score_grads.flatten(1, 2)
            q, g = (each[:, :, rows].reshape(kv_heads, -1, size) for each in (query, grad))
            # Both are in two products, each of which would copy what is not contiguous.
            k, v = (each[:, 0, keys].contiguous() for each in (key, value))
            torch.bmm(q, k.transpose(1, 2), out=p)
            torch.add(minus_lse[:, :, rows], probabilities, alpha=scale, out=probabilities)
            # Masked after exp: a CPU is ten times as long at the exp of minus infinity.
            probabilities.exp_().tril_(start - first)
            if window:
                probabilities.triu_(start - first - window + 1)
            torch.bmm(g, v.transpose(1, 2), out=ds)
            score_grads.sub_(share[:, :, rows]).mul_(probabilities)
            grad_query[:, :, rows] = torch.bmm(ds, k).view(kv_heads, shares, -1, size)
            grad_key[:, 0, keys].baddbmm_(ds.transpose(1, 2), q)
            grad_value[:, 0, keys].baddbmm_(p.transpose(1, 2), g)
    return grad_query.mul_(scale), grad_key.mul_(scale), grad_value


@contextmanager
def _products_in_bf16() -> Iterator[None]:
    """Products of fp32 tensors take their inputs as bf16 and give fp32, where the CPU can."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def window_mask(length: int, window: int, like: Tensor) -> Tensor | None:
    """Additive causal mask [length, length] of a sliding window; none when the window covers everything."""
    if window == 0:
        return None
    position = torch.arange(length, device=like.device)
    distance = position[:, None] - position[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))
