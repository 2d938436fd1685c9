"""A rank's part of the state that a checkpoint holds, in one form for every strategy.

Every strategy here cuts a tensor so that a rank keeps successive elements of it: all of them (DDP), rows (FSDP2), or
any range (ZeRO). So a part is a range of the flattened tensor, which says nothing about the strategy or the number of
ranks that it was cut for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sft_dist.sharding.shard_optimizer import Part, first_element, local


@dataclass(frozen=True)
class StateShard:
    """What this rank holds of one tensor.

    Args:
        values: [n], in row-major order; shares memory with what training reads and writes.
        shape: of the whole tensor.
        first: index of ``values[0]`` in the flattened whole tensor.
        copy, copies: ``copies`` ranks hold this very range, and this one is number ``copy`` of them.
    """

    values: Tensor
    shape: tuple[int, ...]
    first: int
    copy: int = 0
    copies: int = 1

    @property
    def numel(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)

    def share(self) -> StateShard:
        """The part of it that this rank writes: ranks with the same values write a part each."""
        n = self.values.numel()
        start, stop = (n * number // self.copies for number in (self.copy, self.copy + 1))
        return replace(self, values=self.values[start:stop], first=self.first + start, copy=0, copies=1)


def shard_of(tensor: Tensor) -> StateShard:
    """This rank's part of a ``DTensor``; another tensor is one that every rank holds whole."""
    values, shape = local(tensor).view(-1), tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return StateShard(values, shape, 0, dist.get_rank(), dist.get_world_size())
    mesh = tensor.device_mesh
    copies = mesh.size() // Part.of(tensor).count
    return StateShard(values, shape, first_element(tensor), mesh.get_local_rank(0) if copies > 1 else 0, copies)
