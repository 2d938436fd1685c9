"""Where a run writes: is it there, can it be written, has it room, how fast is it, do all nodes see the same folder."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sft_dist.doctor.finding import Finding, odd_ones
from sft_dist.doctor.wanted import Wanted
from sft_dist.plan.units import gib

GIB, MIB = 2**30, 2**20

# What is written to find the rate: so much, or for so long; each part forced to the disk.
PROBE_BYTES, PROBE_PART_BYTES, PROBE_S = 32 * MIB, 4 * MIB, 1.0
# And at most one such part of what is free.
PROBE_SHARE = 8

# Where no plan says what a run takes.
LEAST_FREE_BYTES, USUAL_FREE_BYTES = 64 * MIB, 10 * GIB
# Of TMPDIR: compiled operators, sockets and small files.
TMP_LEAST_BYTES, TMP_USUAL_BYTES = 16 * MIB, 256 * MIB
LEAST_INODES = 1000
# Slower than a memory card. A checkpoint of 1 GiB takes two minutes there.
SLOW_BYTES_PER_S = 10e6

TOKEN = ".doctor-"
# Of an earlier doctor that was killed.
STALE_TOKEN_S = 3600


@dataclass(frozen=True)
class Disk:
    """A folder that is written to.

    Args:
        what: the key or variable that names it.
        needed_bytes: free room without which training fails; enough_bytes: with which nothing is said.
        is_shared: among nodes.
        speed: whether the rate of writing matters.
    """

    what: str
    folder: Path
    needed_bytes: int
    enough_bytes: int
    is_shared: bool = True
    speed: bool = True


def disks_of(wanted: Wanted, env: Mapping[str, str] = os.environ) -> list[Disk]:
    """The folders that a run writes to."""
    found = []
    parts = wanted.disk_parts
    if wanted.output_dir is not None:
        needed = LEAST_FREE_BYTES if parts is None else sum(size for name, size in parts.items() if name != "cache")
        found.append(Disk("output_dir", wanted.output_dir, needed, USUAL_FREE_BYTES if parts is None else needed))
    if wanted.cache_dir is not None:
        # What is in the cache already needs no room; the plan does not know.
        cache = LEAST_FREE_BYTES if parts is None else parts.get("cache", LEAST_FREE_BYTES)
        found.append(Disk("data cache", wanted.cache_dir, LEAST_FREE_BYTES, cache))
    # Not tempfile.gettempdir(), which takes another folder where nothing can be written to this one.
    tmp = Path(env.get("TMPDIR") or "/tmp")
    found.append(Disk("TMPDIR", tmp, TMP_LEAST_BYTES, TMP_USUAL_BYTES, is_shared=False, speed=False))
    return found


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there: the others will be made in it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_disk(node: str, disk: Disk) -> tuple[list[Finding], float | None]:
    """Findings of one folder, and the bytes/s that were written, where that was measured. Leaves nothing behind."""
    folder = nearest_existing(disk.folder)

    def finding(level: str, what: str, fix: str = "", value: float | str | None = None) -> Finding:
        return Finding(disk.what, node, level, what, fix, value, is_shared=disk.is_shared)  # type: ignore[arg-type]

    try:
        usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
    except OSError as error:
        return [finding("failed", f"{folder} cannot be written: {error.strerror}", _fix(error, disk))], None
    free = f"{gib(usage.free)} free in {folder}"
    has_room, rate = usage.free >= disk.needed_bytes, None
    try:
        # Where little is free, less is written: what is wrong is that, not that a probe does not fit.
        rate = _write_rate(folder, min(PROBE_BYTES if disk.speed else PROBE_PART_BYTES, usage.free // PROBE_SHARE))
    except OSError as error:
        if has_room or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return [finding("failed", f"{folder} cannot be written: {error.strerror}", _fix(error, disk))], None
    if not has_room or rate is None:
        what = f"{free}, {gib(disk.needed_bytes)} needed"
        return [finding("failed", what, _room(disk), usage.free / GIB)], rate
    # Some file systems make inodes as they need them, and say 0 of 0.
    if inodes.f_files and inodes.f_favail < LEAST_INODES:
        what = f"{folder}: only {inodes.f_favail} more files can be made there"
        return [finding("failed", what, "remove files that are no longer needed", inodes.f_favail)], rate
    if usage.free < disk.enough_bytes:
        what = f"{free}, {gib(disk.enough_bytes)} may be needed"
        return [finding("warning", what, _room(disk), usage.free / GIB)], rate
    if disk.speed and rate < SLOW_BYTES_PER_S:
        what = f"{folder} takes {rate / 1e6:.1f} MB/s: a checkpoint of 1 GiB takes {GIB / rate:,.0f} s"
        return [finding("warning", what, f"set {_key(disk)} to a faster disk", rate / 1e6)], rate
    speed = f", {rate / 1e6:,.0f} MB/s" if disk.speed else ""
    return [finding("ok", f"{free}{speed}", value=usage.free / GIB)], rate


def _write_rate(folder: Path, size_bytes: int) -> float:
    """Bytes/s that reach the disk: of the fastest part, so that a moment's load of others does not count.

    The file has no name: it goes with this process, however that ends.
    """
    part_bytes = max(1, min(PROBE_PART_BYTES, size_bytes))
    block, best = os.urandom(part_bytes), 0.0
    with tempfile.TemporaryFile(dir=folder) as file:
        until = time.perf_counter() + PROBE_S
        for _ in range(max(1, size_bytes // part_bytes)):
            started = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            now = time.perf_counter()
            best = max(best, len(block) / (now - started))
            if now > until:
                break
    return best


def _fix(error: OSError, disk: Disk) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _room(disk)
    if error.errno == errno.EROFS:
        return f"mount it for writing on this node (mount -o remount,rw), or set {_key(disk)} to another folder"
    return f"let this user write there, or set {_key(disk)} to another folder"


def _room(disk: Disk) -> str:
    return f"remove what is no longer needed there, or set {_key(disk)} to a disk with room"


def _key(disk: Disk) -> str:
    return {"data cache": "data.cache_dir"}.get(disk.what, disk.what)


def check_hub_cache(node: str, folder: Path) -> list[Finding]:
    """The hub's cache, which training only reads."""
    if not folder.exists():
        return [Finding("hub cache", node, "ok", f"{folder} is not there: models are read from folders")]
    if os.access(folder, os.R_OK | os.X_OK):
        return [Finding("hub cache", node, "ok", f"{folder} can be read")]
    fix = "let this user read it, or set HF_HOME to a cache that it may read"
    return [Finding("hub cache", node, "warning", f"{folder} cannot be read", fix, is_shared=True)]


@contextmanager
def token_in(folder: Path) -> Iterator[str | None]:
    """A small file of this node's own, for the other nodes to see; None where none can be written."""
    folder = nearest_existing(folder)
    name = f"{TOKEN}{secrets.token_hex(8)}"
    try:
        (folder / name).touch(exist_ok=False)
    except OSError:
        yield None
        return
    try:
        yield name
    finally:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def tokens_seen(folder: Path, written: Sequence[str]) -> list[str]:
    """Those tokens of this doctor that are in a folder; what a killed doctor left there is removed."""
    folder = nearest_existing(folder)
    with suppress(PermissionError):
        for entry in os.scandir(folder):
            if entry.name.startswith(TOKEN) and entry.name not in written:
                with suppress(OSError):  # another doctor's, who removes it himself
                    if time.time() - entry.stat().st_mtime > STALE_TOKEN_S:
                        os.unlink(entry.path)
    return [name for name in written if (folder / name).exists()]


def check_shared(
    tokens: Mapping[str, str | None], seen: Mapping[str, Sequence[str]], folder: Path, order: Sequence[str]
) -> list[Finding]:
    """Whether one folder is the same on all nodes.

    Args:
        tokens: by node, the one it wrote. seen: by node, those that it found.
    """
    if len(seen) < 2:
        return []
    wrote = {token: name for name, token in tokens.items() if token is not None}
    if not wrote:
        return []  # nobody could write, which is told elsewhere
    views = {name: sorted(wrote[token] for token in found if token in wrote) for name, found in seen.items()}
    _, odd = odd_ones(views, order)
    if not odd:
        return [Finding("shared folder", "", "ok", f"all nodes see the same {folder}")]
    fix = "set output_dir and data.cache_dir to folders on a file system that all nodes mount"
    return [
        Finding("shared folder", name, "failed", f"{folder} is not the folder that the other nodes see", fix)
        for name in odd
    ]
