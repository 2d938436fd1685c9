"""Disks that are full or read-only, and folders that nobody may change. What is made here is undone, however a test ends.

Root may write anywhere, so permissions do not stop it: as root, folders are made immutable and disks are mounted. Where
even root may not do that, the kernel is asked otherwise for a refusal of its own.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# What a disk in memory hands out at a time.
PAGE_BYTES = resource.getpagesize()

# Of a disk that is being written to.
REMOUNT_S = 20


def run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nothing in ``folder`` can be made, renamed or removed."""
    if os.geteuid() != 0:
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(mode)
    elif run("chattr", "+i", str(folder)):
        try:
            yield
        finally:
            assert run("chattr", "-i", str(folder))
    else:
        with read_only(folder):
            yield


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The kernel refuses what would be written into ``folder`` or below."""
    if os.geteuid() != 0:
        with locked(folder):
            yield
        return
    assert run("mount", "--bind", str(folder), str(folder)), "neither chattr nor mount are permitted to root"
    try:
        assert run("mount", "-o", "remount,bind,ro", str(folder))
        yield
    finally:
        assert run("umount", "-l", str(folder))


class Trouble:
    """A disk that can be spoiled and mended while a run writes to it.

    It is a small one of its own, mounted on ``folder``. Where that is not permitted, the ranks may write no file that is
    larger than ``LARGEST_BYTES`` while it is spoiled.

    Args:
        reason: what the operating system says then.
    """

    LARGEST_BYTES = 64 << 10

    def __init__(self, folder: Path, *, is_mounted: bool) -> None:
        self.folder, self.is_mounted, self.reason = folder, is_mounted, ""

    def fill(self, pids: Sequence[int], *, but_for_bytes: int = 0) -> None:
        """Leaves no room, or a little."""
        if not self.is_mounted:
            self._limit(pids, self.LARGEST_BYTES)
            self.reason = "File too large"
            return
        self.reason = "No space left on device" if but_for_bytes else " free"
        spared = -(-but_for_bytes // PAGE_BYTES) * PAGE_BYTES
        with (self.folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.folder).free - spared)

    def forbid(self, pids: Sequence[int]) -> None:
        """Lets nobody write."""
        if not self.is_mounted:
            self._limit(pids, self.LARGEST_BYTES)
            self.reason = "File too large"
            return
        self.reason = "Read-only file system"
        deadline = time.monotonic() + REMOUNT_S
        while not run("mount", "-o", "remount,ro", str(self.folder)):  # busy while a file is open for writing
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def mend(self, pids: Sequence[int]) -> None:
        if not self.is_mounted:
            self._limit(pids, resource.RLIM_INFINITY)
            return
        assert run("mount", "-o", "remount,rw", str(self.folder))
        (self.folder / "filler").unlink(missing_ok=True)

    @staticmethod
    def _limit(pids: Sequence[int], num_bytes: int) -> None:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@contextmanager
def troubled_disk(folder: Path, *, num_bytes: int) -> Iterator[Trouble]:
    """A disk of that size on ``folder``, which must be empty."""
    folder.mkdir(parents=True, exist_ok=True)
    is_mounted = run("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder))
    try:
        yield Trouble(folder, is_mounted=is_mounted)
    finally:
        if is_mounted:
            assert run("umount", "-l", str(folder))
