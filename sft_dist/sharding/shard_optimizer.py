"""Optimizers that step on each rank's own part of the parameters, whatever the strategy made of them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.optim import Optimizer


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; a replicated one is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Part:
    """Which part of a parameter is here: chunk ``index`` of ``count`` along dimension 0, cut as ``torch.chunk`` does.

    Args:
        group: the ranks that hold one chunk each; None where the parameter is whole.
    """

    index: int
    count: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, parameter: Tensor) -> Part:
        if not isinstance(parameter, DTensor):
            return cls(0, 1, None)
        dim = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
        mesh = parameter.device_mesh
        return cls(mesh.get_local_rank(dim), mesh.size(dim), mesh.get_group(dim))


def largest_chunk_numel(parameter: Tensor) -> int:
    """Elements of the first rank's chunk, which no other rank's exceeds."""
    part = Part.of(parameter)
    rows = -(-parameter.shape[0] // part.count)
    return rows * (parameter.numel() // parameter.shape[0])


def first_element(parameter: Tensor) -> int:
    """Where this rank's chunk begins in the flattened parameter."""
    return min(Part.of(parameter).index * largest_chunk_numel(parameter), parameter.numel())


def whole(value: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``value``, of which each rank holds a chunk as it does of ``like``, as one tensor of ``shape``; shares memory."""
    if not isinstance(like, DTensor):
        return value.view(shape)
    value = value.view(-1, *shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(
        like.device_mesh, like.placements, tensor_meta=TensorMeta(torch.Size(shape), stride, value.dtype)
    )
    # Not from_local: on a mesh of GPUs that copies what is kept in host memory to the GPU.
    return DTensor(value, spec, requires_grad=False)  # type: ignore[call-arg, no-any-return]


class ShardOptimizer(Optimizer):
    """Base of the optimizers here: ``self.state[parameter]`` holds local tensors and ``step``, a plain integer."""

    @abstractmethod
    def empty_states(self, parameter: Tensor) -> dict[str, Tensor]:
        """The local states of a parameter before its first step."""

    @abstractmethod
    def whole_states(self, parameter: Tensor) -> dict[str, Tensor]:
        """The states as a checkpoint holds them, the same whoever holds what; they share memory with the local ones."""

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The local states; made at first use, because DeepSpeed exchanges the parameters before it."""
        if not self.state[parameter]:
            self.state[parameter] = {"step": 0, **self.empty_states(parameter)}
        state: dict[str, Any] = self.state[parameter]
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for parameter in trained:
                self.state_of(parameter)["step"] += 1
            self.update(group, trained)

    @abstractmethod
    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Steps ``parameters``, all of which have a gradient; ``step`` of their states counts this step already."""


def gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient."""
    assert parameter.grad is not None
    return local(parameter.grad)
