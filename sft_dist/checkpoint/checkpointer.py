"""Saves a run's state and puts it back. Every rank calls the same methods; each writes and proves its own shard.

The tensors travel through torch's distributed checkpoint (DCP) in its safetensors form: each rank writes what it holds,
and any other number of ranks reads the parts that it needs. Nothing is pickled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, MOVE_AWAY, Identity, Manifest
from sft_dist.checkpoint.proof import FileProof, problems_of, prove_file, tensor_record, verify_files
from sft_dist.errors import CheckpointError
from sft_dist.sharding.strategy import Strategy

T = TypeVar("T")

MAX_SHOWN_PROBLEMS = 3

# A block of an 8-bit moment has one scale: ranks that share a tensor otherwise may have other blocks.
SCALES = ("optim.exp_avg_scale.", "optim.exp_avg_sq_scale.")


class Checkpointer:
    """The checkpoints of one run.

    Args:
        folder: ``checkpoints/`` of the run directory.
        identity: of this run; a checkpoint of another one is refused.
        settings: the resolved configuration as YAML, kept beside every checkpoint.
    """

    def __init__(self, folder: Path, *, keep_last: int, identity: Identity, strategy_name: str, settings: str) -> None:
        self.folder, self.keep_last, self.identity = folder, keep_last, identity
        self.strategy_name, self.settings = strategy_name, settings

    def save(self, strategy: Strategy, *, completed_steps: int, next_sequences: tuple[int, ...]) -> Path:
        """Writes a checkpoint, reads it back, and only then gives it its name; older ones beyond ``keep_last`` go.

        Raises:
            CheckpointError: on every rank; it cannot be written, or what was written is not what is in memory. Older
                checkpoints stay; a rejected one stays too, under a name that nothing resumes from.
        """
        complete = self.folder / store.name_of(completed_steps)
        unfinished = complete.with_name(complete.name + store.UNFINISHED)
        _on_main(lambda: store.begin(self.folder, completed_steps), doing=f"write {complete}")
        state = strategy.state()
        try:
            dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True))
        except CheckpointException as error:
            if dist.get_rank() == 0:
                # What there is of it may be what fills the disk.
                shutil.rmtree(unfinished, ignore_errors=True)
            raise _cannot(f"write {complete}", next(iter(error.failures.values()))[0]) from error
        proofs = _prove(unfinished, state)
        expected = {name: tensor_record(tensor) for name, tensor in state.items()}
        problems = problems_of(proofs, expected, completed_steps=completed_steps)
        if problems:
            rejected = complete.with_name(complete.name + store.REJECTED)
            _on_main(lambda: store.reject(unfinished), doing=f"keep {rejected}")
            raise CheckpointError(
                f"the checkpoint of step {completed_steps} failed its proof: " + _listed(problems),
                fix=f"it is kept as {rejected}; resume from the one before it, and please report this",
            ).everywhere()
        manifest = Manifest(
            completed_steps=completed_steps,
            next_sequences=next_sequences,
            strategy=self.strategy_name,
            world_size=dist.get_world_size(),
            identity=self.identity,
            tensors=expected,
            files={proof.file: proof.record for proof in proofs},
        )
        _on_main(lambda: self._finish(unfinished, manifest), doing=f"write {complete}")
        return complete

    def _finish(self, unfinished: Path, manifest: Manifest) -> None:
        store.write_synced(unfinished / "config.yaml", self.settings)
        store.write_synced(unfinished / MANIFEST, manifest.model_dump_json(indent=1))
        store.commit(unfinished)
        store.prune(self.folder, keep_last=self.keep_last)

    def load(self, checkpoint: Path, strategy: Strategy) -> Manifest:
        """Verifies the files of a checkpoint and puts its state into ``strategy``, on any number of ranks.

        Raises:
            ConfigError: it belongs to another run.
            CheckpointError: it is damaged, or holds other tensors than this run trains.
        """
        manifest = Manifest.read(checkpoint)
        manifest.identity.require_same(self.identity, checkpoint=checkpoint)
        problems = verify_files(checkpoint, manifest, part=dist.get_rank(), parts=dist.get_world_size())
        state = strategy.state()
        mine = {name: tensor_record(tensor) for name, tensor in state.items()}
        for name in sorted(mine.keys() | manifest.tensors.keys()):
            if mine.get(name) != manifest.tensors.get(name):
                problems.append(f"{name} is {manifest.tensors.get(name)} there and {mine.get(name)} here")
        if any(name.startswith(SCALES) and mine.get(name) != manifest.tensors.get(name) for name in mine):
            where = f"{manifest.world_size} processes under {manifest.strategy}"
            problems.insert(0, f"8-bit moments in blocks that are cut otherwise go on only on {where}")
        problems = [problem for part in _gathered(problems) for problem in part]
        if problems:
            raise CheckpointError(
                f"{checkpoint} cannot be resumed from: " + _listed(list(dict.fromkeys(problems))),
                fix=MOVE_AWAY,
            ).everywhere()
        try:
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)))
        except CheckpointException as error:
            raise _cannot(f"read {checkpoint}", next(iter(error.failures.values()))[0]) from error
        strategy.load_state(state, completed_steps=manifest.completed_steps)
        return manifest


def _prove(folder: Path, state: dict[str, Tensor]) -> list[FileProof]:
    """The findings of all ranks about the files that they wrote; a rank with nothing to write has none."""
    own = folder / f"shard-{dist.get_rank() + 1:05d}-model-00001-of-00001.safetensors"
    return [proof for proof in _gathered(prove_file(own, state) if own.exists() else None) if proof is not None]


def _on_main(work: Callable[[], object], *, doing: str) -> None:
    """Runs ``work`` on rank 0 while the others wait; that the disk refuses it is an error on all of them."""
    answer: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer)
    if answer[0] is not None:
        raise _cannot(doing, answer[0])


def _cannot(what: str, cause: object) -> CheckpointError:
    return CheckpointError(
        f"cannot {what}: {str(cause).splitlines()[0]}", fix="make room on the disk, or see who may write there"
    ).everywhere()


def _gathered(value: T) -> list[T]:
    """``value`` of every rank."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _listed(problems: list[str]) -> str:
    more = len(problems) - MAX_SHOWN_PROBLEMS
    return "; ".join(problems[:MAX_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
