"""A checkpoint is read back as soon as it is written, and again before anything is resumed from it.

Every rank reads the file that it wrote and compares it with what it meant to write; rank 0 puts the findings together:
is every tensor there whole and once, finite, and has every adapter moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft_dist.checkpoint.manifest import MANIFEST, FileRecord, Manifest, TensorRecord
from sft_dist.checkpoint.shard_file import Piece, is_finite, is_zero
from sft_dist.runtime import progress

READ_BYTES = 1 << 22

MAX_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Chunk:
    """What one file holds of one tensor: elements ``first`` to ``stop`` of the flattened whole.

    Args:
        is_zero: every element is 0.
    """

    name: str
    first: int
    stop: int
    dtype: str
    is_zero: bool


@dataclass(frozen=True)
class FileProof:
    """One rank's findings about the file that it wrote."""

    file: str
    record: FileRecord
    chunks: tuple[Chunk, ...]
    problems: tuple[str, ...]


def tensor_record(values: Tensor, shape: tuple[int, ...]) -> TensorRecord:
    return TensorRecord(shape=shape, dtype=_dtype(values))


def prove_file(path: Path, written: FileRecord, pieces: Mapping[str, Piece]) -> FileProof:
    """Reads a file back and compares it with what was to be written into it."""
    problems = []
    found = digest_of(path)
    if found != (written.num_bytes, written.digest):
        problems.append(
            f"{path.name} is not what was in memory: {found[0]:,} bytes, {written.num_bytes:,} were written"
        )
    else:
        problems += _misread(path, pieces)
    problems += [
        f"{path.name}: {name} has values that are not finite"
        for name in sorted(pieces)
        if not is_finite(pieces[name].values)
    ]
    chunks = tuple(
        Chunk(name, *piece.range, _dtype(piece.values), _is_lora_b(name) and is_zero(piece.values))
        for name, piece in pieces.items()
    )
    return FileProof(path.name, written, chunks, tuple(problems))


def _misread(path: Path, pieces: Mapping[str, Piece]) -> list[str]:
    """Whether others who read the layout find what is meant by it."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            slices = {name: file.get_slice(name) for name in names & pieces.keys()}
            wrong = [n for n, found in slices.items() if found.get_shape() != [pieces[n].values.numel()]]
    except (SafetensorError, OSError) as error:
        return [f"{path.name} cannot be read back: {error}"]
    return [f"{path.name}: {name} is not as it was written" for name in sorted(wrong + list(names ^ pieces.keys()))]


def digest_of(path: Path) -> tuple[int, str]:
    """Bytes and XXH3-128 of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            progress.tick()
            digest.update(block)
            num_bytes += len(block)
    return num_bytes, digest.hexdigest()


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
    for name, parts in chunks.items():
        if name not in expected:
            problems.append(f"{name} is no tensor of this state")
        elif not _is_whole(parts, math.prod(expected[name].shape)) or {c.dtype for c in parts} - {expected[name].dtype}:
            record = expected[name]
            problems.append(f"{name} is not a whole tensor of shape {record.shape} and dtype {record.dtype}")
        elif completed_steps and _is_lora_b(name) and all(chunk.is_zero for chunk in parts):
            problems.append(f"{name} is all zeros after {completed_steps} steps: the adapter has learned nothing")
    return problems


def _is_whole(parts: list[Chunk], numel: int) -> bool:
    """Whether ranges follow each other from the first to the last element."""
    reached = 0
    for part in sorted(parts, key=lambda part: part.first):
        if part.first != reached:
            return False
        reached = part.stop
    return reached == numel


def verify_files(folder: Path, manifest: Manifest, *, part: int, parts: int) -> list[str]:
    """Compares every ``parts``-th file with its record, from number ``part`` on; one line for each difference.

    A shard from another checkpoint, a cut one and a flipped bit are all found here.
    """
    problems = []
    for name in sorted(manifest.files)[part::parts]:
        path, expected = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != expected.num_bytes:
                problems.append(f"{name} has {size} bytes instead of {expected.num_bytes}")
            elif digest_of(path) != (expected.num_bytes, expected.digest):
                problems.append(f"{name} is not the file that was written at this step")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    if part == 0:
        strangers = {path.name for path in folder.iterdir()} - manifest.files.keys() - {MANIFEST}
        problems += [f"{name} does not belong to it" for name in sorted(strangers)]
    return problems


def _is_lora_b(name: str) -> bool:
    return name.startswith("model.") and ".lora_B." in name


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def listed(problems: list[str]) -> str:
    """The first few of them, and how many there are besides."""
    more = len(problems) - MAX_SHOWN_PROBLEMS
    return "; ".join(problems[:MAX_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
