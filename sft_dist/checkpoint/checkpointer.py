"""Saves a run's state and puts it back. Every rank calls the same methods; each writes and proves its own file.

Saving has two parts. What a rank is to write is copied, for which training waits; then a thread writes and proves it
while training goes on. The ranks' threads meet in a process group of their own, so they are in nobody's way. One save
is in flight at a time: the next one waits for it.
"""

from __future__ import annotations

import errno
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.filesize import decimal
from torch.distributed.distributed_c10d import _set_pg_timeout

from sft_dist.checkpoint import store
from sft_dist.checkpoint.host_copy import HostCopy, in_place
from sft_dist.checkpoint.manifest import MANIFEST, SETTINGS, FileRecord, Identity, Manifest, Position, TensorRecord
from sft_dist.checkpoint.mirror import Mirror
from sft_dist.checkpoint.proof import FileProof, digest_of, listed, problems_of, prove_file, tensor_record
from sft_dist.checkpoint.restore import restore
from sft_dist.checkpoint.rotation import best_of, rotate
from sft_dist.checkpoint.shard_file import Piece, file_name, write_shard
from sft_dist.config.schema import CheckpointConfig
from sft_dist.errors import CheckpointError
from sft_dist.runtime.process_group import from_main, gathered
from sft_dist.sharding.state import StateShard
from sft_dist.sharding.strategy import Strategy

T = TypeVar("T")

# A slow disk of one rank must not look like a lost rank to the others.
WRITE_TIMEOUT = timedelta(hours=12)

# Of a save in flight when training fails: a rank that hangs must not keep the others for longer.
SETTLE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank.

    Args:
        checkpoint: its folder, whether it is there or not.
        error: what went wrong, or None.
        is_fatal: training must not go on.
        fix: what to do about the error.
        notice: what else went wrong: the checkpoint is there, its copy in ``checkpoint.mirror`` is not.
        written_s: seconds from the copy to the end, on this rank.
    """

    checkpoint: Path
    error: str | None = None
    is_fatal: bool = False
    fix: str = ""
    notice: str | None = None
    written_s: float = 0.0


class Checkpointer:
    """The checkpoints of one run. Every rank makes one at the same time.

    Args:
        folder: ``checkpoints/`` of the run directory.
        rules: when a failure ends the run, and what stays.
        identity: of this run.
        settings: the resolved configuration as YAML, kept beside every checkpoint.
        on_file: told of each file that this rank has written and read back: its bytes, and the seconds that it took.
            A thread calls it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rules: CheckpointConfig,
        identity: Identity,
        strategy_name: str,
        settings: str,
        on_file: Callable[[int, float], None] = lambda num_bytes, seconds: None,
    ) -> None:
        self.folder, self.rules, self.identity = folder, rules, identity
        self.strategy_name, self.settings, self._on_file = strategy_name, settings, on_file
        self._group = dist.new_group(backend="gloo")
        # Only now: until a group stands, a rank that is gone is waited for until the time is over.
        _set_pg_timeout(WRITE_TIMEOUT, self._group)
        self._mirror = None if rules.mirror is None else Mirror(rules.mirror)
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._outcomes: list[Outcome] = []
        self._told = 0

    def save(self, strategy: Strategy, position: Position) -> None:
        """Begins to write a checkpoint; it is there when its ``Outcome`` says so. Waits for the one before.

        Raises:
            CheckpointError: on every rank; the one before failed so that training must not go on.
        """
        self.wait()
        started, state = time.perf_counter(), strategy.state()
        expected = {name: tensor_record(shard.values, shard.shape) for name, shard in state.items()}
        pieces, copied = self._pieces(state)

        def write() -> None:
            try:
                copied()
                outcome = self._write(pieces, expected, position)
                self._outcomes.append(_after(outcome, started))
            except BaseException as error:  # raised where training waits for it
                self._crash = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.rules.asynchronous:
            self.wait()

    def _pieces(self, state: Mapping[str, StateShard]) -> tuple[dict[str, Piece], Callable[[], None]]:
        return self._copy.take(state) if self.rules.asynchronous else (in_place(state), lambda: None)

    def wait(self) -> None:
        """Returns when nothing is in flight.

        Raises:
            CheckpointError: on every rank; the last save failed so that training must not go on.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._crash is not None:
            raise self._crash
        if self._outcomes and self._outcomes[-1].is_fatal:
            last = self._outcomes[-1]
            raise CheckpointError(last.error or "", fix=last.fix).everywhere()

    def settle(self) -> None:
        """Lets what is in flight come to its end beside another failure, unless the ranks it needs are gone."""
        if self._thread is not None:
            self._thread.join(SETTLE_TIMEOUT_S)

    @property
    def has_failed(self) -> bool:
        """Whether ``wait`` would raise, as far as this rank knows yet."""
        return self._crash is not None or any(outcome.is_fatal for outcome in self._outcomes)

    def news(self) -> list[Outcome]:
        """Saves that ended since this was asked last; other ranks may hear of them earlier or later."""
        new = self._outcomes[self._told :]
        self._told += len(new)
        return new

    def close(self) -> None:
        """Lets go of the process group and of the host memory. Nothing may be in flight."""
        self._copy = HostCopy()
        dist.destroy_process_group(self._group)

    def best(self) -> Position | None:
        """That of the checkpoint with the best ``rules.goal``, of those that are there; every rank must call it."""
        best = None
        if dist.get_rank() == 0:
            best = best_of([found.position for _, found in store.readable_checkpoints(self.folder)], self.rules.goal)
        return from_main(best, self._group)

    def _write(self, pieces: dict[str, Piece], expected: dict[str, TensorRecord], position: Position) -> Outcome:
        complete = self.folder / store.name_of(position.completed_steps)
        unfinished = complete.with_name(complete.name + store.UNFINISHED)
        size = sum(math.prod(record.shape) * getattr(torch, record.dtype).itemsize for record in expected.values())
        (_, *_), error = self._everywhere(lambda: self._begin(position.completed_steps, size), only_main=True)
        if error is not None:
            return self._cannot_write(complete, error)
        path = unfinished / file_name(dist.get_rank(), dist.get_world_size())

        def write_and_read_back() -> FileProof | None:
            if not pieces:
                return None
            started = time.perf_counter()
            proof = prove_file(path, write_shard(path, pieces), pieces)
            self._on_file(proof.record.num_bytes, time.perf_counter() - started)
            return proof

        proofs, error = self._everywhere(write_and_read_back)
        if error is not None:
            return self._cannot_write(complete, error)
        found = [proof for proof in proofs if proof is not None]
        problems = problems_of(found, expected, completed_steps=position.completed_steps)
        if problems:
            return self._rejected(unfinished, problems, position)
        _, error = self._everywhere(lambda: self._finish(unfinished, expected, found, position), only_main=True)
        if error is not None:
            return self._cannot_write(complete, error)
        _, undeleted = self._everywhere(lambda: rotate(self.folder, self.rules), only_main=True)
        notice = None if self._mirror is None else self._copied(self._mirror, complete, path.name)
        if undeleted is not None:
            return _cannot_delete(complete, undeleted, notice)
        return Outcome(complete, notice=notice)

    def _begin(self, completed_steps: int, num_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"it takes {decimal(num_bytes)}, and the disk has {decimal(free)} free")
        store.begin(self.folder, completed_steps)

    def _finish(
        self, unfinished: Path, expected: dict[str, TensorRecord], proofs: list[FileProof], position: Position
    ) -> None:
        settings = unfinished / SETTINGS
        store.write_synced(settings, self.settings)
        num_bytes, digest = digest_of(settings)
        files = {proof.file: proof.record for proof in proofs}
        manifest = Manifest(
            position=position,
            strategy=self.strategy_name,
            world_size=dist.get_world_size(),
            identity=self.identity,
            tensors=expected,
            files=files | {settings.name: FileRecord(num_bytes=num_bytes, digest=digest)},
        )
        store.write_synced(unfinished / MANIFEST, manifest.text())
        store.commit(unfinished)

    def _copied(self, mirror: Mirror, complete: Path, own: str) -> str | None:
        """Copies a checkpoint to its mirror, each rank its own file, and lets go there of what is gone here.

        Returns:
            why the copy is not complete, or None.
        """
        names = [own] if (complete / own).exists() else []
        _, error = self._everywhere(lambda: mirror.upload_files(complete, names))

        def complete_it() -> None:
            mirror.upload_files(complete, [SETTINGS])
            mirror.commit(complete)

        if error is None:
            _, error = self._everywhere(complete_it, only_main=True)
        # Also makes up for what failed before.
        _, other = self._everywhere(lambda: mirror.follow(self.folder), only_main=True)
        return error or other

    def _cannot_write(self, complete: Path, cause: str) -> Outcome:
        """What there is of it is removed: it may be what fills the disk."""

        def remove() -> bool:
            shutil.rmtree(complete.with_name(complete.name + store.UNFINISHED), ignore_errors=True)
            return bool(store.complete_checkpoints(self.folder))

        (has_others, *_), _ = self._everywhere(remove, only_main=True)
        return Outcome(
            complete,
            error=f"cannot write {complete}: {cause}",
            is_fatal=self.rules.on_failure == "stop" or not has_others,
            fix="make room on the disk, or see who may write there"
            + ("; then go on with --resume auto" if has_others else ""),
        )

    def _rejected(self, unfinished: Path, problems: list[str], position: Position) -> Outcome:
        complete = unfinished.with_name(store.name_of(position.completed_steps))
        rejected = complete.with_name(complete.name + store.REJECTED)
        self._everywhere(lambda: store.reject(unfinished), only_main=True)
        return Outcome(
            complete,
            error=f"the checkpoint of step {position.completed_steps} failed its proof: " + listed(problems),
            is_fatal=True,
            fix=f"it is kept as {rejected}; resume from the one before it, and please report this",
        )

    def _everywhere(
        self, work: Callable[[], T | None], *, only_main: bool = False
    ) -> tuple[list[T | None], str | None]:
        """Runs ``work`` on every rank or on rank 0, and tells all of them how it went.

        Returns:
            the results by rank, and the first refusal of an operating system or of a mirror, or None.
        """
        answer: tuple[T | None, str | None] = (None, None)
        if dist.get_rank() == 0 or not only_main:
            try:
                answer = (work(), None)
            except OSError as error:
                answer = (None, str(error.strerror or error))
            except CheckpointError as error:
                answer = (None, error.what)
        answers = gathered(answer, self._group)
        return [result for result, _ in answers], next((error for _, error in answers if error is not None), None)

    def load(self, checkpoint: Path, strategy: Strategy) -> Manifest:
        """Puts the state of a checkpoint into ``strategy``. Raises as ``restore``."""
        return restore(checkpoint, strategy, group=self._group)


def _cannot_delete(complete: Path, cause: str, notice: str | None) -> Outcome:
    return Outcome(
        complete,
        notice=notice,
        error=f"{complete} is saved, but an older checkpoint cannot be deleted: {cause}",
        fix=f"see who may write in {complete.parent}, or make room there by hand",
    )


def _after(outcome: Outcome, started: float) -> Outcome:
    return replace(outcome, written_s=time.perf_counter() - started)
