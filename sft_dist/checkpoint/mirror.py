"""Copies of a run's checkpoints in object storage. Imports no torch.

Object stores cannot rename, so a copy exists once its manifest does: ``manifest.json`` is uploaded last and deleted
first, and a copy that lacks it, or has a file of another size than it says, counts as absent. What is fetched is
compared with its digests besides, and becomes a checkpoint of the run directory by a rename like any other.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import xxhash
from pydantic import BaseModel, ValidationError

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, FileRecord
from sft_dist.checkpoint.object_store import ATTEMPTS, FIRST_PAUSE_S, ObjectStore, failed
from sft_dist.errors import CheckpointError, ConfigError

READ_BYTES = 1 << 24


class _Files(BaseModel):
    """Of a manifest, what a copy is measured by; all else is for those who read the checkpoint."""

    files: dict[str, FileRecord]


class DamagedCopy(CheckpointError):
    """A copy that is not what was uploaded; others may be."""


class Mirror:
    """The copies of one run's checkpoints below a URL: ``URL/step-00000100/...``.

    May be used by several threads, as long as they work on different files.

    Args:
        url, attempts, first_pause_s: as for ``ObjectStore``.

    Raises:
        ConfigError: no such kind of storage, or its package is not installed.
    """

    def __init__(self, url: str, *, attempts: int = ATTEMPTS, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._objects = ObjectStore(url, attempts=attempts, first_pause_s=first_pause_s)
        self.url = self._objects.url

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine's file systems; None: elsewhere."""
        return self._objects.folder

    def prove_writable(self) -> None:
        """Writes a small object and removes it.

        Raises:
            ConfigError: that fails.
        """
        try:
            self._objects.prove_writable()
        except CheckpointError as error:
            raise ConfigError(
                f"checkpoint.mirror: {error.what}",
                fix="check the URL, the network and your credentials, which must allow to list, write, read and "
                "delete; or set checkpoint.mirror to null",
            ) from error

    def complete(self) -> list[int]:
        """Steps of the complete copies, the oldest first.

        Raises:
            CheckpointError: the storage does not answer.
        """
        return sorted(self._manifests())

    def num_bytes(self, step: int) -> int:
        """Of all files of a copy that are there."""
        return sum(self._listed().get(step, {}).values())

    def is_copy_of(self, checkpoint: Path) -> bool:
        """Whether the complete copy of its step is one of this checkpoint."""
        return self._manifests().get(_step(checkpoint)) == (checkpoint / MANIFEST).read_bytes()

    def follow(self, folder: Path) -> list[int]:
        """Makes the mirror hold the complete checkpoints of ``folder``, the newest first, and then no others.

        What failed before is made up for. An empty folder is not followed: it would leave nothing.

        Returns:
            the steps that were uploaded.

        Raises:
            CheckpointError: a transfer failed for good; what is complete there stays until the next time.
        """
        local = {_step(path): path for path in store.complete_checkpoints(folder)}
        there, uploaded = self._manifests(), []
        for step, checkpoint in sorted(local.items(), reverse=True):
            if there.get(step) != (checkpoint / MANIFEST).read_bytes():
                self.upload(checkpoint)
                uploaded.append(step)
        if local:
            for step in sorted(self._listed().keys() - local.keys()):
                self.delete(step)
        return uploaded

    def upload(self, checkpoint: Path) -> None:
        """Copies a complete checkpoint, file by file, its manifest last.

        Raises:
            CheckpointError: a transfer failed for good.
        """
        self.upload_files(checkpoint, sorted(_files(checkpoint)))
        self.commit(checkpoint)

    def upload_files(self, checkpoint: Path, names: Iterable[str]) -> None:
        """Copies some files of a checkpoint. Until ``commit`` the copy counts as absent, even if it did not before.

        Raises:
            CheckpointError: a transfer failed for good.
        """
        step = _step(checkpoint)
        self._withdraw(step)
        for name in names:
            self._objects.put(checkpoint / name, _path(step, name))

    def commit(self, checkpoint: Path) -> None:
        """Copies the manifest, when all files that it names are there.

        Raises:
            CheckpointError: one is not, or the transfer failed for good.
        """
        step = _step(checkpoint)
        problems = _differences(_files(checkpoint), self._listed().get(step, {}))
        if problems:
            raise failed(f"{self._name(step)} cannot be completed", problems[0])
        self._objects.put(checkpoint / MANIFEST, _path(step, MANIFEST))

    def fetch(self, step: int, folder: Path) -> Path:
        """Copies a checkpoint into ``folder``, where it must not be yet; it gets its name when it is proven.

        Returns:
            the complete checkpoint.

        Raises:
            DamagedCopy: a file is not what was uploaded.
            CheckpointError: there is no complete copy of this step, or a transfer failed for good.
        """
        content = self._manifests().get(step)
        if content is None:
            raise CheckpointError(f"{self._name(step)} is not a complete checkpoint", fix=f"choose from {self.url}")
        files = _Files.model_validate_json(content).files
        try:
            _require_room(folder, sum(record.num_bytes for record in files.values()), self._name(step))
            unfinished = store.begin(folder, step)
        except OSError as error:
            raise _not_written(self._name(step), folder, error) from error
        try:
            for name, record in sorted(files.items()):
                self._get(step, name, record, unfinished)
            store.write_synced(unfinished / MANIFEST, content.decode())
            return store.commit(unfinished)
        except OSError as error:
            raise _not_written(self._name(step), folder, error) from error
        finally:
            # What is left of it may be what fills the disk.
            shutil.rmtree(unfinished, ignore_errors=True)

    def delete(self, step: int) -> None:
        """Removes a copy, complete or not; its manifest first.

        Raises:
            CheckpointError: it cannot be removed.
        """
        self._withdraw(step)
        self._objects.remove(store.name_of(step))

    def _withdraw(self, step: int) -> None:
        self._objects.remove(_path(step, MANIFEST))

    def _listed(self) -> dict[int, dict[str, int]]:
        """Bytes of every file that is there, by step and name."""

        sizes: dict[int, dict[str, int]] = defaultdict(dict)
        for path, num_bytes in self._objects.sizes().items():
            folder, _, name = path.partition("/")
            step = store.step_of(folder)
            if step is not None and name:
                sizes[step][name] = num_bytes
        return dict(sizes)

    def _manifests(self) -> dict[int, bytes]:
        """Manifests of the complete copies, by step."""
        found = {}
        for step, sizes in self._listed().items():
            if MANIFEST not in sizes:
                continue
            content = self._objects.read(_path(step, MANIFEST))
            try:
                files = _Files.model_validate_json(content or b"").files
            except ValidationError:
                continue  # cut off while it was written
            if not _differences(files, sizes):
                found[step] = content or b""
        return found

    def _get(self, step: int, name: str, record: FileRecord, unfinished: Path) -> None:
        """Fetches a file and compares it with its record.

        Raises:
            OSError: it cannot be written here.
        """
        if PurePosixPath(name).name != name:
            raise _damaged(self._name(step), f"{name} is no name of a file")
        local = unfinished / name
        self._objects.get(_path(step, name), local)
        digest = xxhash.xxh3_128()
        with local.open("rb+") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
            num_bytes = file.tell()
            os.fsync(file.fileno())
        if (num_bytes, digest.hexdigest()) != (record.num_bytes, record.digest):
            raise _damaged(self._name(step), f"{name} is not the file that was uploaded")

    def _name(self, step: int) -> str:
        return f"{self.url}/{store.name_of(step)}"


def split_url(url: str) -> tuple[str, int] | None:
    """The mirror and the step that ``URL/step-00000100`` means; None: it is no such URL."""
    parent, _, name = url.rstrip("/").rpartition("/")
    step = store.step_of(name)
    return None if step is None else (parent, step)


def _path(step: int, name: str) -> str:
    return f"{store.name_of(step)}/{name}"


def _step(checkpoint: Path) -> int:
    step = store.step_of(checkpoint.name)
    if step is None:
        raise ValueError(f"{checkpoint} is not called as a complete checkpoint is")
    return step


def _files(checkpoint: Path) -> dict[str, FileRecord]:
    """Of a complete checkpoint on this machine."""
    return _Files.model_validate_json((checkpoint / MANIFEST).read_bytes()).files


def _differences(files: dict[str, FileRecord], sizes: dict[str, int]) -> list[str]:
    """What keeps files of these sizes from being a complete copy, a line each."""
    return [
        f"{name} is missing" if name not in sizes else f"{name} has {sizes[name]} bytes instead of {record.num_bytes}"
        for name, record in sorted(files.items())
        if sizes.get(name) != record.num_bytes
    ]


def _require_room(folder: Path, num_bytes: int, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{name} takes {num_bytes / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB left",
            fix="make room on the disk, or set another output_dir",
        )


def _damaged(name: str, why: str) -> DamagedCopy:
    return DamagedCopy(f"{name} is damaged: {why}", fix="delete it there and resume from another one")


def _not_written(name: str, folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot fetch {name} into {folder}: {error.strerror or error}",
        fix="make room on the disk, or see who may write there",
    )
