"""Reads tensors of a checkpoint, in any ranges, whatever number of ranks wrote it under whatever strategy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor

from sft_dist.checkpoint.manifest import Manifest


class _Part(NamedTuple):
    """Elements ``first`` to ``stop`` of a tensor are in ``file``."""

    first: int
    stop: int
    file: str


class CheckpointReader:
    """A checkpoint whose files are mapped; only what is asked for is read.

    It does not look at digests: ``verify_files`` does.

    Attributes:
        manifest: of the checkpoint.
        names: of its tensors: ``model.NAME`` and ``optim.KIND.NAME``, see ``Strategy.state``.

    Raises:
        CheckpointError: the folder is no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.read(folder)
        self.names = tuple(sorted(self.manifest.tensors))
        self._folder, self._open, self._stack = folder, dict[str, Any](), ExitStack()
        self._parts: dict[str, list[_Part]] = {name: [] for name in self.names}
        for file, record in self.manifest.files.items():
            for name, (first, stop) in record.ranges.items():
                self._parts[name].append(_Part(first, stop, file))
        for parts in self._parts.values():
            parts.sort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def release(self) -> None:
        """Unmaps the files: until then what was read of them may count as memory of the process."""
        self._stack.close()
        self._open.clear()

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU, in the dtype that it was stored in."""
        record = self.manifest.tensors[name]
        whole = torch.empty(math.prod(record.shape), dtype=getattr(torch, record.dtype))
        self.read_into(whole, name, first=0)
        return whole.view(record.shape)

    def read_into(self, values: Tensor, name: str, *, first: int) -> None:
        """Fills ``values``, [n], with elements ``first`` to ``first + n`` of a flattened tensor."""
        for start, stop, part in self._overlapping(name, first, first + values.numel()):
            stored = self._file(part.file).get_slice(name)[start - part.first : stop - part.first]
            values[start - first : stop - first].copy_(stored)

    def _overlapping(self, name: str, first: int, stop: int) -> Iterator[tuple[int, int, _Part]]:
        for part in self._parts[name]:
            start, end = max(first, part.first), min(stop, part.stop)
            if start < end:
                yield start, end, part

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(safe_open(self._folder / name, framework="pt"))
        return self._open[name]
