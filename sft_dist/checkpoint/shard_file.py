"""The file that one rank writes into a checkpoint: its parts of all tensors, in safetensors' layout.

Each tensor in it has one dimension, the elements of a range of the flattened whole; the manifest says which range.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from sft_dist.checkpoint.manifest import FileRecord
from sft_dist.model.safetensors_writer import TensorPlan, header
from sft_dist.runtime import progress

# Of a file at a time: what is hashed while it is still in the processor's cache.
BLOCK_BYTES = 1 << 22

# The bits that are all ones in a number that is not finite, by dtype; as integers of that width.
_EXPONENTS = {
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
}


@dataclass(frozen=True)
class Piece:
    """A range of a tensor in host memory, to be written.

    Args:
        first: of its elements in the flattened whole.
        values: [n], contiguous.
    """

    first: int
    values: Tensor

    @property
    def range(self) -> tuple[int, int]:
        return self.first, self.first + self.values.numel()


def file_name(rank: int, world_size: int) -> str:
    return f"shard-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def write_shard(path: Path, pieces: Mapping[str, Piece]) -> FileRecord:
    """Writes pieces, and returns when they are on the disk.

    Nothing but numpy and file operations: it runs beside training, whose threads torch's would take from.

    Raises:
        OSError: the disk is full, or the like.
    """
    digest, num_bytes = xxhash.xxh3_128(), 0
    plans = [TensorPlan(name, piece.values.dtype, (piece.values.numel(),)) for name, piece in pieces.items()]
    head, starts = header(plans)
    with path.open("wb") as file:
        for block in (head, *(block for name in starts for block in blocks(pieces[name].values))):
            file.write(block)
            digest.update(block)
            num_bytes += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(
        num_bytes=num_bytes,
        digest=digest.hexdigest(),
        ranges={name: piece.range for name, piece in pieces.items()},
    )


def blocks(values: Tensor) -> Iterator[bytes | memoryview]:
    """The bytes of a contiguous tensor in host memory, without a copy."""
    raw = values.view(torch.uint8).numpy().data
    for start in range(0, len(raw), BLOCK_BYTES):
        yield raw[start : start + BLOCK_BYTES]
        progress.tick()


def is_finite(values: Tensor) -> bool:
    if values.dtype not in _EXPONENTS:
        return True
    kind, ones = _EXPONENTS[values.dtype]
    bits = values.view(torch.uint8).numpy().view(kind)
    step = BLOCK_BYTES // bits.itemsize
    return not any(
        bool(((part & ones) == ones).any()) for part in (bits[i : i + step] for i in range(0, len(bits), step))
    )


def is_zero(values: Tensor) -> bool:
    """Whether every bit is 0 but for signs."""
    if values.dtype not in _EXPONENTS:
        return not bool(values.numpy().any())
    kind, _ = _EXPONENTS[values.dtype]
    bits = values.view(torch.uint8).numpy().view(kind)
    return not bool((bits << kind(1)).any())
