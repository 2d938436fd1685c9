"""The weights of a model folder, one file or many, read in parts."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft_dist.errors import CheckpointError
from sft_dist.model.hub import weight_files
from sft_dist.model.safetensors_writer import DTYPE_NAMES

# Dtypes of weights that can be trained from, as the files name them; others are quantised or no numbers.
TRAINABLE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

TORCH_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, its shape, and its dtype as the file names it ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """Every tensor of ``NAME.safetensors``, or of the shards that ``NAME.safetensors.index.json`` lists.

    Files are mapped, not read: what is not asked for costs nothing, and pages of a file are not memory of a process.

    Args:
        key: of the configuration, for messages.

    Raises:
        CheckpointError: there are no weights, or a file is damaged or missing.
    """

    def __init__(self, folder: Path, name: str = "model", *, key: str = "model.path") -> None:
        self.folder, self._name, self._key = folder, name, key
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in self._weight_files():
            header = self._open(file)
            for key in header.keys():  # noqa: SIM118  it is no dict
                part = header.get_slice(key)
                self.tensors[key] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """[stop - start] the flat elements of a tensor from ``start`` on, in the file's dtype, on the CPU."""
        stored = self.tensors[key]
        try:
            header = self._open(stored.file)
            if not stored.shape:
                whole: Tensor = header.get_tensor(key).reshape(1)
                return whole[start:stop]
            row = math.prod(stored.shape[1:])
            if row == 0 or start == stop:
                return header.get_slice(key)[0:0].flatten()
            first = start // row
            rows: Tensor = header.get_slice(key)[first : -(-stop // row)]
            return rows.flatten()[start - first * row : stop - first * row]
        except (OSError, SafetensorError) as e:
            raise self._unreadable(stored.file, e) from e

    def read_bytes(self, key: str, start: int, stop: int) -> Tensor:
        """[stop - start] uint8, bytes of a tensor from ``start`` on, whatever its dtype."""
        stored = self.tensors[key]
        size = _itemsize(stored.dtype)
        first = start // size
        elements = self.read(key, first, -(-stop // size))
        return elements.view(torch.uint8)[start - first * size : stop - first * size]

    def num_bytes(self, key: str) -> int:
        """Of one tensor."""
        stored = self.tensors[key]
        return math.prod(stored.shape) * _itemsize(stored.dtype)

    def _weight_files(self) -> list[Path]:
        names = weight_files(self.folder, self._name, key=self._key)
        if not names:
            raise self._error(f"{self.folder} has no {self._name}.safetensors")
        for name in names:
            if not (self.folder / name).is_file():
                raise self._error(f"{self.folder} lacks {name}, which {self._name}.safetensors.index.json lists")
        return [self.folder / name for name in names]

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as e:
                raise self._unreadable(file, e) from e
        return self._files[file]

    def _unreadable(self, file: Path, error: Exception) -> CheckpointError:
        return self._error(f"no readable weights in {file} ({str(error).strip().partition(chr(10))[0]})")

    def _error(self, what: str) -> CheckpointError:
        files = f"{self._name}.safetensors, or its shards and {self._name}.safetensors.index.json"
        return CheckpointError(f"{self._key}: {what}", fix=f"the folder needs {files}")


class UnmappedFolder(SafetensorsFolder):
    """The same, read instead of mapped.

    What is read of a mapped file counts as memory of the process until it is closed, though the system may take it
    back. Where every byte of a large model is read once, and the memory that it takes must be told, nothing is mapped.
    """

    def __init__(self, folder: Path, name: str = "model", *, key: str = "model.path") -> None:
        self._descriptors: dict[Path, int] = {}
        self._offsets: dict[str, int] = {}
        super().__init__(folder, name, key=key)
        for file in self._files:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
                self._offsets |= _offsets(file)
            except OSError as e:
                raise self._unreadable(file, e) from e
        self._files.clear()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        stored = self.tensors[key]
        size = _itemsize(stored.dtype)
        values = torch.empty((stop - start) * size, dtype=torch.uint8)
        missing, at = values.numpy().data, self._offsets[key] + start * size
        while missing:
            try:
                count = os.preadv(self._descriptors[stored.file], [missing], at)
            except OSError as e:
                raise self._unreadable(stored.file, e) from e
            if count == 0:
                raise self._unreadable(stored.file, ValueError(f"it ends within {key}"))
            missing, at = missing[count:], at + count
        return values.view(TORCH_DTYPES[stored.dtype])


def _offsets(file: Path) -> dict[str, int]:
    """First byte of each tensor in a file whose header has been checked."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _itemsize(stored: str) -> int:
    """Bytes of an element, from the name of its dtype in the file: what does not end in its bits has eight."""
    bits = re.fullmatch(r"[A-Z]+(16|32|64)", stored)
    return int(bits[1]) // 8 if bits else 1
