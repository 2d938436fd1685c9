"""Puts the state of a checkpoint back. Every rank calls the same function and reads the ranges that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from sft_dist.checkpoint.manifest import MOVE_AWAY, Manifest
from sft_dist.checkpoint.proof import listed, tensor_record
from sft_dist.checkpoint.reader import CheckpointReader
from sft_dist.errors import CheckpointError
from sft_dist.runtime.process_group import gathered
from sft_dist.sharding.state import StateShard
from sft_dist.sharding.strategy import Strategy

# A block of an 8-bit moment has one scale: ranks that share a tensor otherwise may have other blocks.
SCALES = ("optim.exp_avg_scale.", "optim.exp_avg_sq_scale.")


def restore(checkpoint: Path, strategy: Strategy, *, group: dist.ProcessGroup) -> Manifest:
    """Puts the state of a checkpoint into ``strategy``, on any number of ranks.

    The files must have been verified, and whose they are.

    Args:
        group: of all ranks, in which they tell each other what went wrong.

    Raises:
        CheckpointError: on every rank; it holds other tensors than this run trains, or cannot be read.
    """
    state = strategy.state()
    with CheckpointReader(checkpoint) as reader:
        manifest = reader.manifest
        _refuse(checkpoint, _other_tensors(state, manifest), group)
        _refuse(checkpoint, _read(reader, state), group)
    strategy.restored(completed_steps=manifest.position.updates)
    return manifest


def _refuse(checkpoint: Path, problems: list[str], group: dist.ProcessGroup) -> None:
    problems = [problem for part in gathered(problems, group) for problem in part]
    if problems:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed from: " + listed(list(dict.fromkeys(problems))), fix=MOVE_AWAY
        ).everywhere()


def _other_tensors(state: Mapping[str, StateShard], manifest: Manifest) -> list[str]:
    """In what a checkpoint differs from the state that it is to become."""
    mine = {name: tensor_record(shard.values, shard.shape) for name, shard in state.items()}
    problems = [
        f"{name} is {manifest.tensors.get(name)} there and {mine.get(name)} here"
        for name in sorted(mine.keys() | manifest.tensors.keys())
        if mine.get(name) != manifest.tensors.get(name)
    ]
    if any(name.startswith(SCALES) and mine.get(name) != manifest.tensors.get(name) for name in mine):
        where = f"{manifest.world_size} processes under {manifest.strategy}"
        problems.insert(0, f"8-bit moments in blocks that are cut otherwise go on only on {where}")
    return problems


def _read(reader: CheckpointReader, state: Mapping[str, StateShard]) -> list[str]:
    try:
        with torch.no_grad():
            for name, shard in state.items():
                reader.read_into(shard.values, name, first=shard.first)
    except (OSError, SafetensorError) as error:
        return [f"{name} cannot be read: {error}"]
    return []
