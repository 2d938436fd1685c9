"""The folder that an export writes: it must be free and have room, and gets its name when all of it is on the disk.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from sft_dist.checkpoint import store
from sft_dist.errors import CheckpointError, ConfigError


def require_free(folder: Path) -> None:
    """
    Raises:
        ConfigError: there is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty", fix="give another folder by --out, or remove it")


def require_room(unfinished: Path, num_bytes: int) -> None:
    """
    Raises:
        CheckpointError: the disk has less.
    """
    around = next(path for path in unfinished.resolve().parents if path.exists())
    free = shutil.disk_usage(around).free
    if free < num_bytes:
        raise CheckpointError(
            f"{decimal(num_bytes)} are to be written, and {around} has {decimal(free)} left",
            fix="make room, or give a folder on another disk by --out",
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: the disk refuses something.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder} ({error.strerror or error})", fix="make room, or give another folder by --out"
        ) from error


def publish(unfinished: Path, folder: Path) -> None:
    """Puts what was written on the disk and gives it its name."""
    for path in unfinished.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    store.sync(unfinished)
    if folder.exists():
        folder.rmdir()  # empty, as was seen before
    unfinished.rename(folder)
    store.sync(folder.resolve().parent)
