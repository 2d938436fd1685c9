"""A checkpoint is read back as soon as it is written, and again before anything is resumed from it.

Every rank reads the file that it wrote and compares each tensor, bit for bit, with what it holds in memory; rank 0 puts
the findings together: is every tensor whole, of the right shape, finite, and has every adapter moved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.tensor import DTensor

from sft_dist.checkpoint.manifest import FileRecord, Manifest, TensorRecord

READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Chunk:
    """What one file holds of one tensor, as it was read back.

    Args:
        offsets, shape: of the chunk in the whole tensor.
        is_zero: every element is 0.
    """

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    is_zero: bool


@dataclass(frozen=True)
class FileProof:
    """One rank's findings about the file that it wrote."""

    file: str
    record: FileRecord
    chunks: tuple[Chunk, ...]
    problems: tuple[str, ...]


def tensor_record(tensor: Tensor) -> TensorRecord:
    """Shape and dtype of a tensor of the state; a ``DTensor`` has those of the whole."""
    return TensorRecord(shape=tuple(tensor.shape), dtype=_dtype(tensor.dtype))


def prove_file(path: Path, state: Mapping[str, Tensor]) -> FileProof:
    """Reads a file back and compares it with the state that was to be written into it.

    A file that cannot be read is a finding like any other: the ranks must hear of it together.
    """
    try:
        chunks, problems = _compare(path, state)
        return FileProof(path.name, file_record(path), tuple(chunks), tuple(problems))
    except (OSError, SafetensorError) as error:
        unread = FileRecord(num_bytes=0, digest="")
        return FileProof(path.name, unread, (), (f"{path.name} cannot be read back: {error}",))


def _compare(path: Path, state: Mapping[str, Tensor]) -> tuple[list[Chunk], list[str]]:
    chunks, problems = [], []
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        offsets = json.loads(metadata.get(CUSTOM_METADATA_KEY, "{}"))
        for name in file.keys():  # noqa: SIM118  a safetensors handle is no mapping
            stored = file.get_tensor(name)
            at = tuple(offsets[name][SAVED_OFFSETS_KEY]) if name in offsets else (0,) * stored.ndim
            chunks.append(
                Chunk(name, at, tuple(stored.shape), _dtype(stored.dtype), is_zero=not bool(stored.count_nonzero()))
            )
            if name not in state:
                problems.append(f"{path.name}: {name} is no tensor of this state")
            elif not _same_bits(stored, _local(state[name]).cpu()):
                problems.append(f"{path.name}: {name} is not what was in memory")
            elif not bool(torch.isfinite(stored).all()):
                problems.append(f"{path.name}: {name} has values that are not finite")
    return chunks, problems


def file_record(path: Path) -> FileRecord:
    """Size and digest of a file."""
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileRecord(num_bytes=num_bytes, digest=digest.hexdigest())


def problems_of(proofs: list[FileProof], expected: Mapping[str, TensorRecord], *, completed_steps: int) -> list[str]:
    """What is wrong with a whole checkpoint, one line each, from the findings about its files.

    Args:
        expected: every tensor of the state, whole.
        completed_steps: after the first, no adapter may be where it started: its B at zero.
    """
    problems = [problem for proof in proofs for problem in proof.problems]
    chunks: dict[str, list[Chunk]] = {name: [] for name in expected}
    for proof in proofs:
        for chunk in proof.chunks:
            chunks.setdefault(chunk.name, []).append(chunk)
    for name, record in expected.items():
        parts = [chunk for chunk in chunks[name] if math.prod(chunk.shape)]
        if not parts:
            problems.append(f"{name} is missing")
            continue
        ends = zip(*((o + s for o, s in zip(c.offsets, c.shape, strict=True)) for c in parts), strict=True)
        shape = tuple(max(end) for end in ends)
        # Chunks are cut along one dimension: starts that differ and sizes that add up are a whole tensor.
        is_whole = len({c.offsets for c in parts}) == len(parts) and sum(
            math.prod(c.shape) for c in parts
        ) == math.prod(record.shape)
        if shape != record.shape or not is_whole or {c.dtype for c in parts} != {record.dtype}:
            problems.append(f"{name} is not a whole tensor of shape {record.shape} and dtype {record.dtype}")
        elif completed_steps and _is_lora_b(name) and all(chunk.is_zero for chunk in parts):
            problems.append(f"{name} is all zeros after {completed_steps} steps: the adapter has learned nothing")
    return problems


def verify_files(folder: Path, manifest: Manifest, *, part: int, parts: int) -> list[str]:
    """Compares every ``parts``-th file with its record, from number ``part`` on; one line for each difference.

    A shard from another checkpoint, a cut one and a flipped bit are all found here.
    """
    problems = []
    for name in sorted(manifest.files)[part::parts]:
        path, expected = folder / name, manifest.files[name]
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected.num_bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected.num_bytes}")
        elif file_record(path) != expected:
            problems.append(f"{name} is not the file that was written at this step")
    if part == 0:
        strangers = {path.name for path in folder.glob("*.safetensors")} - manifest.files.keys()
        problems += [f"{name} does not belong to it" for name in sorted(strangers)]
    return problems


def _is_lora_b(name: str) -> bool:
    return name.startswith("model.") and ".lora_B." in name


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
