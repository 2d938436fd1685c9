"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509): ranks share the tokens of one micro-batch.

Each rank of a group holds a contiguous part of the T tokens; only attention needs the others. There an all-to-all
exchanges tokens for heads, so that every rank attends all tokens of the exact segments with its share of the heads, and
a second one exchanges back:

    [t, heads, d] -> to_heads -> [T, heads / P, d] -> attention -> [T, heads / P, d] -> to_tokens -> [t, heads, d]

The parts need not be equal, because an all-to-all takes any sizes: nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AllToAll(torch.autograd.Function):
    """Sends the first ``send[0]`` rows of a tensor to rank 0 of the group, the next to rank 1; gradients go back.

    Args:
        rows: [sum(send), ...].
        send, receive: rows for and from each rank of the group, known to the host.

    Returns:
        [sum(receive), ...], what rank 0 sent first.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


@dataclass(frozen=True)
class SequenceParallel:
    """The group that shares a micro-batch, and how its tokens are divided.

    Args:
        group: its ranks, in the order of their tokens.
        split: tokens of each rank.
    """

    group: dist.ProcessGroup
    split: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.split)

    @property
    def num_local(self) -> int:
        """Tokens of this rank."""
        return self.split[dist.get_rank(self.group)]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, heads, d] and twice [t, kv_heads, d] of the rank's tokens -> this rank's heads of all T tokens.

        The number of heads must be a multiple of the group's size. Key and value heads that cannot be dealt evenly are
        repeated first, as often as needed and no more.

        Returns:
            [T, heads / P, d] and twice [T, shared_kv_heads / P, d]; views of one tensor, which travelled in one piece.
        """
        repeats = shared_kv_heads(key.shape[1], self.size) // key.shape[1]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        by_rank = [x.unflatten(1, (self.size, x.shape[1] // self.size)) for x in (query, key, value)]
        send = torch.cat([x.transpose(0, 1) for x in by_rank], dim=2).flatten(0, 1)
        received: Tensor = AllToAll.apply(send, (self.num_local,) * self.size, self.split, self.group)
        q, k, v = received.split([x.shape[2] for x in by_rank], dim=1)
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """[T, heads / P, d] -> [t, heads, d]: back to the rank's tokens with all heads."""
        received: Tensor = AllToAll.apply(out, self.split, (self.num_local,) * self.size, self.group)
        return received.unflatten(0, (self.size, self.num_local)).transpose(0, 1).flatten(1, 2)


def shared_kv_heads(kv_heads: int, size: int) -> int:
    """Key and value heads that ``size`` ranks can share evenly: the least multiple of both.

    It divides any number of query heads that both divide, so each of them keeps a whole group of query heads.
    """
    return math.lcm(kv_heads, size)
