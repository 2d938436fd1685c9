"""What the dry run knows of operators: which do the work, and what a CUDA kernel allocates where no trace sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes  # noqa: F401  registers its operators
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sft_dist.model.cpu_attention import packed_attention, packed_attention_backward

aten = torch.ops.aten

ATTENTION = frozenset(
    {packed_attention._opoverload.overloadpacket, packed_attention_backward._opoverload.overloadpacket}
)
PRODUCTS = frozenset({aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm})
DEQUANTIZE = frozenset({torch.ops.bitsandbytes.dequantize_4bit, torch.ops.bitsandbytes.dequantize_blockwise})


def _logsumexp(inputs: Sequence[Tensor]) -> int:
    """ATen/native/ReduceOps.cpp: (self - max).exp_() is a copy."""
    return inputs[0].nbytes


def _attention_backward(inputs: Sequence[Tensor]) -> int:
    """FlashAttention-2's ``mha_varlen_bwd``: the query's gradient is added up in fp32, and where query heads share keys
    and values these have a gradient for each query head first."""
    query, key = inputs[1], inputs[2]
    tokens, heads, head_dim = query.shape
    padded = -(-head_dim // 32) * 32
    accumulated = 4 * (tokens + 128) * heads * (padded + 1)
    expanded = 2 * key.shape[0] * heads * head_dim * key.element_size() if key.shape[1] != heads else 0
    return accumulated + expanded


# What the CUDA form of an operator allocates and frees again, from its input tensors.
INNER: dict[Any, Callable[[Sequence[Tensor]], int]] = {
    aten.logsumexp: _logsumexp,
    packed_attention_backward._opoverload.overloadpacket: _attention_backward,
}

# They start no kernel: what a fake tensor asks of itself, views that are not declared as such, memory without values.
IDLE = frozenset(
    {
        torch.ops.prim.device, aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
        aten.new_empty_strided, aten.lift_fresh,
    }
)  # fmt: skip

# Of their first input they touch no more than what they hand out, or what they are handed.
PICKING = frozenset({aten.embedding, aten.gather, aten.index, aten.index_select, aten.scatter_add_})


def moved_bytes(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Bytes that an operator reads and writes: every input and every output once, an expanded one as it is stored."""
    if func.overloadpacket in PICKING:
        least = min(t.nbytes for t in (*inputs, *outputs) if t.is_floating_point())
        return 2 * least + sum(t.nbytes for t in inputs if not t.is_floating_point())
    unique = (list({id(t): t for t in tensors}.values()) for tensors in (inputs, outputs))
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for tensors in unique for t in tensors)


def inner_bytes(func: Any, inputs: Sequence[Tensor]) -> int:
    """Bytes that an operator's CUDA form allocates and frees before it returns."""
    inner = INNER.get(func.overloadpacket)
    return 0 if inner is None else inner(inputs)


def attended_pairs(seq_lens: Sequence[int], window: int) -> int:
    """Pairs of a query and a key that causal attention looks at, over all segments."""
    pairs = 0
    for length in seq_lens:
        seen = min(length, window) if window else length
        # The first `seen` queries see 1, 2, ..., seen keys, the others `seen` each.
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    return pairs


@register_flop_formula(aten.addmm_)
def _addmm_in_place_flops(
    _self: Sequence[int], left: Sequence[int], right: Sequence[int], out_shape: Sequence[int] | None = None, **_: Any
) -> int:
    """[m, k] by [k, n]."""
    return 2 * left[0] * left[1] * right[1]


@register_flop_formula(packed_attention._opoverload.overloadpacket, get_raw=True)
def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: Sequence[int], scale: float, window: int, **_: Any
) -> int:
    """Two products of d numbers for each pair and head."""
    return 2 * 2 * attended_pairs(seq_lens, window) * query.shape[-2] * query.shape[-1]


@register_flop_formula(packed_attention_backward._opoverload.overloadpacket, get_raw=True)
def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    seq_lens: Sequence[int], scale: float, window: int, **_: Any,
) -> int:  # fmt: skip
    """Five products: the scores again, and the gradients of value, probabilities, query and key."""
    return 5 * 2 * attended_pairs(seq_lens, window) * query.shape[-2] * query.shape[-1]
