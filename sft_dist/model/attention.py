"""Causal attention over packed segments, exact: no token sees another segment and nothing is padded.

Transformers calls :func:`packed_attention_forward` by name (``ATTENTION_NAME``) in every layer and hands it the
segments' bounds, which arrive as extra forward keywords. On CUDA the work is torch's variable-length flash attention;
on the CPU an operator of our own attends segment by segment. Both keep the same tensors for backward: query, key,
value, output and the log-sum-exp, so that a trace on fake CPU tensors sees what a GPU would hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sft_dist.errors import ConfigError
from sft_dist.model.cpu_shapes import filled_up
from sft_dist.model.row_cache import RowCache
from sft_dist.model.sequence_parallel import SequenceParallel
from sft_dist.model.virtual_tokens import Prefix

ATTENTION_NAME = "sft_dist_packed"

# Tokens of a segment up to which a CPU takes its gradients in fp32, where that is faster than in bf16.
MAX_FP32_BACKWARD = 320


@torch.library.custom_op("sft_dist::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: Sequence[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each segment, on the CPU.

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
            q, k, v, 0.0, window == 0, attn_mask=_window_mask(filled, window, q), scale=scale
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
    # Short segments in fp32: cast once for all of them.
    wide = tuple(t.float() for t in inputs) if min(seq_lens) <= MAX_FP32_BACKWARD else inputs
    grads = torch.empty_like(wide[1]), torch.empty_like(wide[2]), torch.empty_like(wide[3])
    start = 0
    for length in seq_lens:
        stop = start + length
        is_short = length <= MAX_FP32_BACKWARD
        filled = length if is_short or query.dtype == torch.float32 else filled_up(length)
        g, q, k, v, o = (_of_segment(t, start, stop, filled, query, key) for t in (wide if is_short else inputs))
        segment_lse = lse[:, start:stop]
        if filled > length:
            segment_lse = F.pad(segment_lse, (0, filled - length))
        segment = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, segment_lse.unflatten(0, q.shape[:2]).contiguous(), 0.0, window == 0,
            attn_mask=_window_mask(filled, window, q), scale=scale,
        )  # fmt: skip
        for whole, part in zip(grads, segment, strict=True):
            # Each query head has a gradient of the key or value head that it shares; their sum is the head's.
            of_head = part.flatten(0, 1) if part.shape[1] == 1 or whole is grads[0] else part.sum(1)
            whole[start:stop] = of_head[:, :length].transpose(0, 1)
        start = stop
    grad_query, grad_key, grad_value = (each.to(query.dtype) for each in grads)
    return grad_query, grad_key, grad_value


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


def _as_batch(x: Tensor, heads: int) -> Tensor:
    """[t, kv_heads, d] -> [1, heads, t, d], repeating heads that are shared."""
    x = x.transpose(0, 1)
    return (x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], dim=0)).unsqueeze(0)


def _window_mask(length: int, window: int, like: Tensor) -> Tensor | None:
    """Additive causal mask [length, length] of a sliding window; none when the window covers everything."""
    if window == 0:
        return None
    position = torch.arange(length, device=like.device)
    distance = position[:, None] - position[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))


def per_segment_sdpa(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: Sequence[int], scale: float, window: int
) -> Tensor:
    """The reference: torch's own attention on each segment. Also the CUDA path in fp32, which flash attention lacks."""
    heads = query.shape[1]
    parts = []
    for q, k, v in zip(*(t.split(list(seq_lens)) for t in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[0], window, q)
        batch_q, batch_k, batch_v = (_as_batch(t, heads) for t in (q, k, v))
        o = F.scaled_dot_product_attention(
            batch_q, batch_k, batch_v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        parts.append(o[0].transpose(0, 1))
    return torch.cat(parts)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seq_len: int, scale: float, window: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seq_len, max_seq_len,
        scale=scale, window_size=(window - 1 if window else -1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def next_token_attention(
    query: Tensor, keys: Tensor, values: Tensor, cache: RowCache, scale: float, sliding_window: int | None
) -> Tensor:
    """What the newest token of each row sees: all of its row, or the last tokens of it; without gradients.

    Args:
        query: [rows, heads, d].
        keys, values: buffers of ``cache``, the newest tokens in them.
        sliding_window: tokens that a query sees, itself included; None: all.

    Returns:
        [rows, heads, d].
    """
    window = sliding_window if sliding_window is not None and sliding_window < max(cache.lens) else 0
    if query.device.type == "cuda" and query.dtype != torch.float32:
        return _varlen_next(query, keys, values, cache, scale, window)
    rows = []
    for q, start, length in zip(query, cache.starts, cache.lens, strict=True):
        seen = slice(start + max(0, length - window) if window else start, start + length)
        # The heads that share a key are queries of it: none of them is the other's future.
        k, v = (t[seen].transpose(0, 1)[None] for t in (keys, values))
        rows.append(F.scaled_dot_product_attention(q.unflatten(0, (keys.shape[1], -1))[None], k, v, scale=scale))
    return torch.cat(rows).flatten(1, 2)


def _varlen_next(query: Tensor, keys: Tensor, values: Tensor, cache: RowCache, scale: float, window: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # A window ends with a row's only query, which is its last token in use.
    out = varlen_attn(
        query, keys, values, cache.query_bounds, cache.bounds, 1, max(cache.lens), scale=scale,
        window_size=(window - 1 if window else -1, 0), enable_gqa=query.shape[1] != keys.shape[1], seqused_k=cache.used,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    seq_lens: tuple[int, ...] | None = None,
    max_seq_len: int | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_parallel: SequenceParallel | None = None,
    prefix: Prefix | None = None,
    row_cache: RowCache | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls: query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d].

    Where ranks share the T tokens, these are the rank's own; the bounds are those of all tokens in any case.
    With a ``prefix`` the bounds are those of the rows with their virtual tokens, of which the T tokens are not.
    With a ``row_cache`` that a pass over whole rows has filled, the T tokens are one of each row.
    """
    if seq_lens is None or max_seq_len is None or cu_seqlens is None:
        raise ConfigError(
            f"model.path: {type(module).__name__} does not pass the bounds of the rows on to its attention",
            fix="choose a model that hands extra forward keywords to Transformers' attention interface",
        )
    if attention_mask is not None or dropout:
        raise ConfigError(
            f"model.path: {type(module).__name__} asks for an attention mask or dropout, which packed attention lacks",
            fix="set its attention dropout to 0 in config.json, or choose another model",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A window that no segment exceeds is plain causal attention, which has the faster kernel.
    window = sliding_window if sliding_window is not None and sliding_window < max_seq_len else 0
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if sequence_parallel is not None:
        q, k, v = sequence_parallel.to_heads(q, k, v)
    if prefix is not None:
        q, k, v = prefix.put_before(module.layer_idx, q, k, v, seq_lens)  # type: ignore[arg-type]
    if row_cache is not None:
        if not row_cache.is_first_pass:
            out = next_token_attention(q, *row_cache.append(module, k, v), row_cache, scale, sliding_window)
            return out.unsqueeze(0), None
        row_cache.fill(module, k, v)
    if q.device.type != "cuda":
        out, _lse = packed_attention(q, k, v, seq_lens, scale, window)
    elif q.dtype == torch.float32:
        out = per_segment_sdpa(q, k, v, seq_lens, scale, window)
    else:
        out = _varlen(q, k, v, cu_seqlens, max_seq_len, scale, window)
    if sequence_parallel is not None:
        out = sequence_parallel.to_tokens(out)
    if prefix is not None:
        out = prefix.cut_off(out, seq_lens)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
