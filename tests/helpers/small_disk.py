"""A disk that a test can fill and empty."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

NO_LIMIT = resource.RLIM_INFINITY


class SmallDisk(Protocol):
    """
    Args:
        folder: on it.
        reason: what a write that finds no room is told.
    """

    folder: Path
    reason: str

    def fill(self, growing: Path, pid: int = 0) -> None:
        """From here on process ``pid`` (0: this one) can add less than a page, perhaps half a line, to a file."""

    def free(self, pid: int = 0) -> None:
        """There is room again."""


class Tmpfs:
    """A mounted file system of its own."""

    reason = "No space left on device"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, growing: Path, pid: int = 0) -> None:
        descriptor = os.open(self.folder / "filler", os.O_WRONLY | os.O_CREAT)
        with suppress(OSError):
            while True:
                os.write(descriptor, bytes(4096))
        os.close(descriptor)

    def free(self, pid: int = 0) -> None:
        (self.folder / "filler").unlink()


class Limit:
    """The kernel's limit on the size of the files that a process writes, where nothing may be mounted."""

    reason = "File too large"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, growing: Path, pid: int = 0) -> None:
        size = growing.stat().st_size if growing.exists() else 0
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 100, NO_LIMIT))

    def free(self, pid: int = 0) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (NO_LIMIT, NO_LIMIT))


@contextmanager
def small_disk(folder: Path, *, size: str = "1m", mounted: bool = True) -> Iterator[SmallDisk]:
    """
    Args:
        mounted: a file system of ``size``, if this process may mount one.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if mounted and subprocess.run(command, capture_output=True).returncode == 0:
        try:
            yield Tmpfs(folder)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    limit = Limit(folder)
    try:
        yield limit
    finally:
        limit.free()
