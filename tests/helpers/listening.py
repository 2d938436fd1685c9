"""Hears the collectives of this process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Heard = Counter[tuple[str, int]]

KINDS = {
    "allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce", "reduce_": "reduce",
    "alltoall": "all_to_all",
}  # fmt: skip

# A single number: a norm, a sum of losses or DeepSpeed's overflow flag.
SCALAR_BYTES = 8


class Listening(TorchDispatchMode):
    """Counts collectives by kind and bytes of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: Heard = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            called = name.removeprefix("c10d.").lstrip("_")
            kind = next((kind for start, kind in KINDS.items() if called.startswith(start)), called)
            size = max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            if size > SCALAR_BYTES:
                self.heard[kind, size] += 1
        return function(*args, **(kwargs or {}))
