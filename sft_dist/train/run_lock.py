"""One run in one directory: rank 0 holds a lock on ``output_dir/.lock`` until its process ends. Imports no torch.

The lock is the kernel's (``flock``), not the file: it goes with the process, however that ends, so nothing stale can
remain. The file stays, and says who holds the lock or held it last. Processes that rank 0 starts do not inherit it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sft_dist.errors import ConfigError

LOCK = ".lock"

# A launcher that starts processes again may do so while the old ones are still being killed.
PATIENCE_S = 10.0
POLL_S = 0.1

# What file systems say that have no locks: NFS without its lock service, Lustre mounted without flock, some of FUSE.
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# Of this process: the open lock of each file, by device and inode.
_held: dict[tuple[int, int], int] = {}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. ``started``: ISO 8601."""

    host: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """None: who holds the lock has not written it yet."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return None


def hold(folder: Path, *, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> None:
    """Takes the lock of a run directory, for as long as this process lives; nothing if it has it.

    Args:
        say: told if it has to wait, or if the file system cannot lock: then nothing is locked.
        patience_s: to wait for another process to end.

    Raises:
        ConfigError: another process holds it.
        OSError: the folder cannot be written.
    """
    path, deadline, waits = folder / LOCK, time.monotonic() + patience_s, False
    while not _is_held(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # Python opens with O_CLOEXEC
        try:
            is_taken = _take(descriptor, path)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in CANNOT_LOCK:
                raise
            say(
                f"output_dir: {folder} is on a file system that cannot lock ({error.strerror}): "
                "see to it that no other run writes there"
            )
            return
        if is_taken:
            continue
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise _in_use(folder, Holder.read(path))
        if not waits:
            waits = True
            say(f"{_in_use(folder, Holder.read(path)).what}: waiting {patience_s:.0f} s for its end")
        time.sleep(POLL_S)


def look(folder: Path) -> None:
    """Whether a run may begin in a folder, as far as can be said without holding it.

    A holder on another machine may be rank 0 of the very launch that this process prepares a part of, so only rank 0
    can refuse because of it.

    Raises:
        ConfigError: another process of this machine holds the lock.
        OSError: the folder cannot be read.
    """
    path = folder / LOCK
    if not path.exists() or _is_held(path):
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # those who look do not see each other
        except BlockingIOError:
            holder = Holder.read(path)
            if holder is None or holder.host == socket.gethostname():
                raise _in_use(folder, holder) from None
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise


def _take(descriptor: int, path: Path) -> bool:
    """Whether the lock could be had; raises ``OSError`` if there are no locks here, or the file cannot be written."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    found = os.fstat(descriptor)
    if _identity(path) != (found.st_dev, found.st_ino):
        return False  # the folder was deleted and made again meanwhile
    content = json.dumps(asdict(Holder.this_process())).encode()
    # In place: on a full disk there is room where something was before.
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    _held[found.st_dev, found.st_ino] = descriptor
    return True


def _is_held(path: Path) -> bool:
    """By this process."""
    return _identity(path) in _held


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _in_use(folder: Path, holder: Holder | None) -> ConfigError:
    who = "another process" if holder is None else f"process {holder.pid} on {holder.host} since {holder.started}"
    return ConfigError(
        f"output_dir: {folder} is in use by {who}",
        fix="wait for the end of that run or stop it, or set another output_dir",
    )


def _close_in_child() -> None:
    """A forked process would share the lock, and keep it when its parent has died."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
