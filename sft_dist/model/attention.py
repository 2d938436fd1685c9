"""Causal attention over packed segments, exact: no token sees another segment and nothing is padded.

Transformers calls :func:`packed_attention_forward` by name (``ATTENTION_NAME``) in every layer and hands it the
segments' bounds, which arrive as extra forward keywords. On CUDA the work is torch's variable-length flash attention;
on the CPU an operator of our own attends segment by segment (``cpu_attention``). Both keep the same tensors for
backward: query, key, value, output and the log-sum-exp, so that a trace on fake CPU tensors sees what a GPU would hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sft_dist.errors import ConfigError
from sft_dist.model.cpu_attention import packed_attention, window_mask
from sft_dist.model.row_cache import RowCache
from sft_dist.model.sequence_parallel import SequenceParallel
from sft_dist.model.virtual_tokens import Prefix

ATTENTION_NAME = "sft_dist_packed"


def _as_batch(x: Tensor, heads: int) -> Tensor:
    """[t, kv_heads, d] -> [1, heads, t, d], repeating heads that are shared."""
    x = x.transpose(0, 1)
    return (x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], dim=0)).unsqueeze(0)


def per_segment_sdpa(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: Sequence[int], scale: float, window: int
) -> Tensor:
    """The reference: torch's own attention on each segment. Also the CUDA path in fp32, which flash attention lacks."""
    heads = query.shape[1]
    parts = []
    for q, k, v in zip(*(t.split(list(seq_lens)) for t in (query, key, value)), strict=True):
        mask = window_mask(q.shape[0], window, q)
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
    # Not t[0], whose gradient would be a copy among zeros.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
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
