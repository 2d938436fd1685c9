"""Writes tensors of any size into safetensors files without ever holding one of them.

The header of a safetensors file stands first and says where every tensor begins and ends. So the writer is told all
names, dtypes and shapes before the first byte, and then takes each tensor in as many parts as the caller likes:

    writer = SafetensorsWriter(folder, plans, max_file_bytes=5_000_000_000)
    writer.write("model.embed_tokens.weight", first_rows)
    writer.write("model.embed_tokens.weight", other_rows)
    ...
    writer.finish()

Format: https://huggingface.co/docs/safetensors, section "Format". Names of the files and of the index are those of
Transformers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# As the files call them.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

# The header is padded with spaces, so that the first tensor begins at a multiple of this.
HEADER_ALIGNMENT = 8

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class _Place:
    """Where a tensor is in the files, and how much of it is there."""

    plan: TensorPlan
    file: str
    descriptor: int
    offset: int
    written: int = 0  # elements


def plan_files(plans: Sequence[TensorPlan], max_file_bytes: int) -> list[list[TensorPlan]]:
    """The tensors of each file, in their order; a tensor that is larger than the limit has a file of its own."""
    files: list[list[TensorPlan]] = [[]]
    room = max_file_bytes
    for plan in plans:
        if plan.num_bytes > room and files[-1]:
            files.append([])
            room = max_file_bytes
        files[-1].append(plan)
        room -= plan.num_bytes
    return files


def header(plans: Sequence[TensorPlan], metadata: Mapping[str, str] = METADATA) -> tuple[bytes, dict[str, int]]:
    """What stands in front of the tensors of a file, and where in the file each of them begins.

    Large elements come first: then each tensor begins at a multiple of its element's size.

    Raises:
        ValueError: a dtype has no name in the format.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for plan in sorted(plans, key=lambda plan: -plan.dtype.itemsize):
        if plan.dtype not in DTYPE_NAMES:
            raise ValueError(f"{plan.name}: {plan.dtype} has no name in the format")
        starts[plan.name], end = end, end + plan.num_bytes
        entries[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [starts[plan.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    content = len(text).to_bytes(8, "little") + text
    return content, {name: len(content) + start for name, start in starts.items()}


class SafetensorsWriter:
    """``NAME.safetensors``, or ``NAME-00001-of-00003.safetensors`` and so on with ``NAME.safetensors.index.json``.

    Use it as a context, which closes the files whatever happens; only ``finish`` makes them complete.

    Args:
        folder: exists, and holds none of these files.
        plans: every tensor, each name once. They may be written in any order.
        max_file_bytes: of the tensors of a file.
        metadata: of the header, beside ``METADATA``.

    Raises:
        ValueError: a name comes twice, or a dtype has no name in the format.
        OSError: a file cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        plans: Sequence[TensorPlan],
        *,
        max_file_bytes: int,
        name: str = "model",
        metadata: Mapping[str, str] = METADATA,
    ) -> None:
        names = [plan.name for plan in plans]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is to be written twice")
        self._folder, self._name = folder, name
        self._places: dict[str, _Place] = {}
        self._descriptors: dict[str, int] = {}
        files = plan_files(plans, max_file_bytes)
        try:
            for number, content in enumerate(files, start=1):
                part = "" if len(files) == 1 else f"-{number:05d}-of-{len(files):05d}"
                self._begin(f"{name}{part}.safetensors", content, metadata)
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._folder / file for file in self._descriptors)

    @property
    def num_bytes(self) -> int:
        """Of all tensors, written or not."""
        return sum(place.plan.num_bytes for place in self._places.values())

    def write(self, name: str, part: Tensor) -> None:
        """Appends to a tensor: the elements of ``part``, in order, follow those that were given before.

        Raises:
            ValueError: it is of another dtype than was planned, or too long.
            OSError: the disk is full.
        """
        place = self._places[name]
        plan = place.plan
        if part.dtype != plan.dtype or place.written + part.numel() > plan.numel:
            raise ValueError(
                f"{name} is {plan.dtype} {list(plan.shape)}: {part.numel()} elements of {part.dtype} behind "
                f"{place.written} are none of it"
            )
        data = part.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
        at = place.offset + place.written * plan.dtype.itemsize
        while data:
            count = os.pwrite(place.descriptor, data, at)
            data, at = data[count:], at + count
        place.written += part.numel()

    def finish(self) -> None:
        """Puts everything on the disk, and writes the index where there are several files.

        Raises:
            ValueError: a tensor is not complete.
        """
        for place in self._places.values():
            if place.written < place.plan.numel:
                raise ValueError(f"{place.plan.name} has {place.written} of {place.plan.numel} elements")
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        if len(self._descriptors) > 1:
            index = {
                "metadata": {"total_size": self.num_bytes},
                "weight_map": {name: place.file for name, place in sorted(self._places.items())},
            }
            with (self._folder / f"{self._name}.safetensors.index.json").open("w", encoding="utf-8") as file:
                file.write(json.dumps(index, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.close()

    def close(self) -> None:
        """Lets go of the files, complete or not."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, file: str, plans: Sequence[TensorPlan], metadata: Mapping[str, str]) -> None:
        """Writes the header, and gives the file its size."""
        content, starts = header(plans, metadata)
        descriptor = os.open(self._folder / file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._descriptors[file] = descriptor
        os.pwrite(descriptor, content, 0)
        os.truncate(descriptor, len(content) + sum(plan.num_bytes for plan in plans))
        for plan in plans:
            self._places[plan.name] = _Place(plan, file, descriptor, starts[plan.name])
