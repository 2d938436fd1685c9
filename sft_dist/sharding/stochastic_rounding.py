"""Rounding fp32 to bf16 up or down by chance, so that the mean of what is stored is what was meant.

bf16 keeps 8 bits: a change of less than 2^-9 of a value is lost when rounding to the nearest. AdamW's second moment
changes by at most 1 - beta2 = 0.001 of itself a step when it falls, so to the nearest it would only ever rise, and a
weight of 0.02 would not see an update below 4e-5. Rounded by chance, both move as they should on average (Zamirai et
al. 2020, arXiv 2010.06192).

The chance is a hash of the element's place in its tensor and of the step, not a generator: every way to shard a tensor
rounds it alike, replicas stay equal, and a resumed run needs no generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 32


def store(tensor: Tensor, value: Tensor, *, first: int, step: int, stream: int) -> None:
    """Writes flat fp32 ``value`` to flat ``tensor`` of the same size, stochastically if that is bf16.

    Args:
        first: place of the first element in the whole tensor.
        stream: tells apart what is rounded in one step, so that a weight and its moments do not share their chance.
    """
    if tensor.dtype != torch.bfloat16:
        tensor.copy_(value)
        return
    bits = value.view(torch.int32) + random_16_bits(value.numel(), first, step, stream, value.device)
    # The lower half is what bf16 lacks: what is added there carries over as often as its value says.
    tensor.copy_(bits.bitwise_and_(~0xFFFF).view(torch.float32))


def random_16_bits(count: int, first: int, step: int, stream: int, device: torch.device) -> Tensor:
    """[count] int32 between 0 and 65,535: a function of place, step and stream (the hash is lowbias32, C. Wellons)."""
    key = (_mixed(step * 4 + stream) + first) % _WORD
    x = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(key))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)  # a shift without the sign
        x *= _signed(factor)
    return (x >> 16).bitwise_and_(0xFFFF)


def _mixed(x: int) -> int:
    """The same hash for one word, far from its neighbours'."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) % _WORD
    return x ^ (x >> 16)


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned word."""
    return word - _WORD if word >= _WORD // 2 else word
