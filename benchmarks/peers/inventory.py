"""What a model's parameters take: whole, on a rank, and gathered, by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Group:
    """Parameters of one layer, or of everything that is in none.

    Args:
        frozen_bytes: as the module sees them, packed weights aside.
        packed_bytes, scale_bytes: of 4-bit weights and their quantisation state.
        trained: elements of the base that train.
        adapters: elements that the method adds.
        largest_bytes: of the largest weight, dequantised.
        tensors: that train.
    """

    frozen_bytes: int = 0
    packed_bytes: int = 0
    scale_bytes: int = 0
    trained: int = 0
    adapters: int = 0
    largest_bytes: int = 0
    tensors: int = 0


@dataclass(frozen=True)
class Inventory:
    """Of a whole model whose layers are alike."""

    layer: Group
    root: Group
    layers: int

    def total(self, name: str) -> int:
        return getattr(self.root, name) + self.layers * getattr(self.layer, name)


def inventory(model: nn.Module, blocks: list[nn.Module], layers: int) -> Inventory:
    """Counts the last but one recorded layer, which stands for all, and what is in no layer."""
    inside = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    root = [(n, p) for n, p in model.named_parameters() if id(p) not in inside]
    rest = [(n, b) for n, b in model.named_buffers() if id(b) not in inside]
    alike = blocks[-2]
    layer = _group(list(alike.named_parameters()), list(alike.named_buffers()))
    return Inventory(layer, _group(root, rest), layers)


def _group(parameters: Iterable, buffers: Iterable) -> Group:
    frozen = trained = adapters = largest = packed = scales = tensors = 0
    for name, parameter in parameters:
        if not parameter.requires_grad:
            frozen += parameter.nbytes
        elif is_added(name):
            adapters += parameter.numel()
        else:
            trained += parameter.numel()
        largest = max(largest, parameter.nbytes)
        tensors += parameter.requires_grad
    for name, buffer in buffers:
        last = name.rpartition(".")[2]
        if last == "packed":
            packed += buffer.nbytes
        elif last in ("scales", "outer"):
            scales += buffer.nbytes
    return Group(frozen, packed, scales, trained, adapters, largest, tensors)


def is_added(name: str) -> bool:
    return any(part in name for part in ("lora_", "adapter_", "gating_factor"))
