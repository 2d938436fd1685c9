"""The folder ``checkpoints/``: names, what counts as complete, atomic renames, and what is deleted when.

A checkpoint is written as ``step-00000100.unfinished`` and renamed when all of it is on the disk and proven. So a
folder without a suffix is complete, whenever the power fails.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.naming import complete_checkpoints, name_of, step_of
from sft_dist.errors import CheckpointError

__all__ = ["complete_checkpoints", "name_of", "step_of"]  # names are in naming.py, which needs nothing else

UNFINISHED, DELETED, REJECTED, DAMAGED = ".unfinished", ".deleted", ".rejected", ".damaged"
SUFFIXES = (UNFINISHED, DELETED, REJECTED, DAMAGED)


def readable_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Complete checkpoints whose manifest can be read, oldest step first."""
    found = []
    for path in complete_checkpoints(folder):
        with suppress(CheckpointError):
            found.append((path, Manifest.read(path)))
    return found


def begin(folder: Path, completed_steps: int) -> Path:
    """An empty folder to write a checkpoint into.

    Raises:
        FileExistsError: there is a complete checkpoint of this step; a run never saves a step twice.
    """
    if (folder / name_of(completed_steps)).exists():
        raise FileExistsError(f"{folder / name_of(completed_steps)} exists")
    unfinished = folder / (name_of(completed_steps) + UNFINISHED)
    for left in _half_done(folder):  # by a save that could not even remove what it had written
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def commit(unfinished: Path) -> Path:
    """Gives a checkpoint its name. Everything in it must have been synced."""
    complete = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED))
    sync(unfinished)
    unfinished.rename(complete)
    sync(complete.parent)
    sync(complete.parent.parent)  # with the first checkpoint its folder is new, too
    return complete


def reject(unfinished: Path) -> Path:
    """Keeps what failed its proof, under a name that nothing resumes from."""
    rejected = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED) + REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    return unfinished.rename(rejected)


def set_aside(checkpoint: Path) -> Path:
    """Takes a damaged checkpoint out of the way of the run, which will come by its step again."""
    damaged = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(damaged, ignore_errors=True)
    return checkpoint.rename(damaged)


def delete(checkpoint: Path) -> None:
    """Takes the name away first: half a checkpoint must not look like one."""
    deleted = checkpoint.with_name(checkpoint.name + DELETED)
    shutil.rmtree(deleted, ignore_errors=True)
    checkpoint.rename(deleted)
    shutil.rmtree(deleted)


def sweep(folder: Path) -> None:
    """Removes what a run left that was ended while it wrote or deleted.

    Raises:
        CheckpointError: it cannot be removed.
    """
    for path in _half_done(folder):
        try:
            shutil.rmtree(path)
        except OSError as error:
            what = f"{path} was left by a run that was ended, and cannot be removed: {error.strerror or error}"
            raise CheckpointError(what, fix=f"see who may write in {folder}") from error


def _half_done(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith((UNFINISHED, DELETED))] if folder.is_dir() else []


def write_synced(path: Path, text: str) -> None:
    """Writes a file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
