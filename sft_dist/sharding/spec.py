"""What each rank holds under a strategy, as arithmetic. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sft_dist.model.spec import DTYPE_BYTES, Dtype

HostPart = Literal["parameters", "optimizer"]


@dataclass(frozen=True)
class ParameterShard:
    """One rank's part of one parameter.

    Args:
        local_numel: elements that stay on this rank between steps.
        dtype: of those elements.
    """

    name: str
    local_numel: int
    dtype: Dtype
    requires_grad: bool

    @property
    def local_bytes(self) -> int:
        return self.local_numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardingSpec:
    """One rank's part of the whole model.

    Args:
        parameters: a shard of every parameter, in the model's order.
        optimizer_numel: elements whose master weight and states this rank's optimizer holds, padding included.
        optimizer_dtype: dtype of those master weights.
        optimizer_state_bytes: what the optimizer keeps for them, beside the master weights.
        on_host: which of ``parameters`` and ``optimizer`` are kept in host memory, even where there is a GPU. Gradients
            are where the optimizer is.
    """

    strategy: str
    rank: int
    parameters: tuple[ParameterShard, ...]
    optimizer_numel: int
    optimizer_dtype: Dtype
    optimizer_state_bytes: int
    on_host: frozenset[HostPart] = frozenset()

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of the model's parameters on this rank between steps."""
        return sum(p.local_bytes for p in self.parameters)


def chunk_numel(dim0: int, row_numel: int, rank: int, world_size: int) -> int:
    """Elements of a rank's chunk when dimension 0 is split as ``torch.chunk`` does: equal chunks, then smaller ones."""
    rows = -(-dim0 // world_size)
    return max(0, min(rows, dim0 - rank * rows)) * row_numel
