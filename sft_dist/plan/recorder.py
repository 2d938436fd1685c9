"""Writes down what operators allocate, free and compute, by the part of the model that is running."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sft_dist.plan.operators import ATTENTION, DEQUANTIZE, IDLE, PRODUCTS, inner_bytes, moved_bytes
from sft_dist.plan.tape import PARTS, Moment, Segment, TapePart, Work

# What torch's caching allocator rounds a request to (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
ALLOCATION_UNIT = 512

_counts: ContextVar[bool] = ContextVar("sft_dist_tape_counts", default=True)


@dataclass
class Recorder(TorchDispatchMode):
    """Writes down what the operators under it allocate and compute."""

    ignored: set[int]
    segment: str = "embed"
    part: TapePart = "activations"
    events: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    work: dict[str, list[Work]] = field(default_factory=dict)
    moments: dict[str, list[Moment]] = field(default_factory=dict)
    live: dict[int, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in outputs:
            self._see(tensor)
        self._current.operators += 1
        if not func.is_view and func.overloadpacket not in IDLE:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self._count(func, args, kwargs or {}, out, inputs, outputs)
        return out

    @property
    def _current(self) -> Work:
        return self.work.setdefault(self.segment, [Work()])[-1]

    def mark(self, moment: Moment) -> None:
        """Ends a stretch of the segment."""
        self.work.setdefault(self.segment, [Work()]).append(Work())
        self.moments.setdefault(self.segment, []).append(moment)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        work = self._current
        work.kernels += 1
        moved = moved_bytes(func, inputs, outputs)
        inner = inner_bytes(func, inputs)
        if inner:  # allocated and freed inside the operator
            self._write(inner, self.part)
            self._write(-inner, self.part)
        packet = func.overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        if packet in ATTENTION:
            work.attention_flops += flops
        elif packet in PRODUCTS:
            work.product_flops += flops
            work.product_bytes += moved
        elif packet in DEQUANTIZE:
            work.dequantize_bytes += moved
        else:
            work.moved_bytes += moved

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.ignored:
            return
        size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT if _counts.get() else 0
        self.live[key] = [size, self.part, weakref.ref(storage, lambda _: self._freed(key))]
        self._write(size, self.part)

    def _freed(self, key: int) -> None:
        size, part, _ = self.live.pop(key)
        self._write(-size, part)

    def call(self, tensor: Tensor, part: TapePart) -> None:
        """Counts what a tensor takes as another part from now on."""
        entry = self.live.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[1] != part:
            self._write(-entry[0], entry[1])
            entry[1] = part
            self._write(entry[0], part)

    def _write(self, size: int, part: TapePart) -> None:
        self.events.setdefault(self.segment, []).append((size, PARTS.index(part)))

    def take(self, name: str) -> Segment:
        """What was recorded under a name."""
        events = np.array(self.events.get(name, []), np.int64).reshape(-1, 2)
        works, moments = self.work.get(name, [Work()]), self.moments.get(name, [])
        stretches = tuple(zip(works, [*moments, "end"], strict=True)) if moments else ()
        return Segment(name, events[:, 0], events[:, 1], sum(works, Work()), stretches)


def on_the_host(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` without what it allocates: that is in host memory when the model is on a GPU."""

    def uncounted(tensor: Tensor) -> Tensor:
        before = _counts.set(False)
        try:
            return function(tensor)
        finally:
            _counts.reset(before)

    return uncounted
