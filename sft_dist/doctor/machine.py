"""What every process of a node shares: memory, /dev/shm, limits and cores."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from sft_dist.doctor.finding import Finding
from sft_dist.doctor.wanted import CPU_PROCESS_BYTES, GPU_PROCESS_BYTES, Wanted

GIB, MIB = 2**30, 2**20

# NCCL's processes of a node talk through files in /dev/shm: its user guide asks containers for --shm-size=1g
# (Troubleshooting, Docker), and with the 64 MB that Docker gives by itself eight GPUs fail. Below the second figure not
# even the semaphores and buffers of Python's worker processes fit.
SHM_FOR_NCCL_BYTES, SHM_LEAST_BYTES = GIB, 16 * MIB
DOCKER_SHM_BYTES = 64 * MIB

# Files and sockets of a training process: its libraries and data beside one connection to each other process (gloo), in
# both directions while they are made.
OPEN_FILES, OPEN_FILES_A_PEER = 100, 2
# A cache of Arrow files, tokenizer and checkpoint shards may open more; most systems give 1,024.
USUAL_OPEN_FILES = 1024

# InfiniBand pins what it sends. NCCL's user guide asks containers for --ulimit memlock=-1; buffers of a few channels
# take less than the second figure.
INFINIBAND, LOCKED_LEAST_BYTES = Path("/sys/class/infiniband"), 256 * MIB

# Of the memory that the configuration counts with, that the system keeps for itself.
MISSING_MEMORY_SHARE = 0.1


def check_memory(node: str, wanted: Wanted, *, num_processes: int, on_gpus: bool) -> list[Finding]:
    """Memory that can be had on this node against what the run needs of it.

    Args:
        num_processes: of the training on this node.
    """
    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = memory_limit_bytes()
    if limit is not None:
        total, free = min(total, limit[0]), min(free, limit[0] - limit[1])
    each = GPU_PROCESS_BYTES if on_gpus else CPU_PROCESS_BYTES
    needed = wanted.host_bytes or num_processes * each
    why = "by the plan" if wanted.host_bytes else f"{_processes(num_processes)} with torch"
    whose = "" if limit is None or limit[0] > total else f" (limit of {limit[2]})"
    found = f"{free / GIB:.1f} GiB of {total / GIB:.1f} GiB free{whose}"
    if free < needed:
        fix = "end what else runs there, ask for more (cluster.memory_gib, --mem), or take a larger node"
        return [
            Finding("memory", node, "failed", f"{found}; {needed / GIB:.1f} GiB needed: {why}", fix, free / GIB),
        ]
    stated = wanted.stated_memory_gib
    if stated is not None and total < (1 - MISSING_MEMORY_SHARE) * stated * GIB:
        what = f"{total / GIB:.1f} GiB of memory{whose}, and hardware.host_memory_gib is {stated:g}"
        return [Finding("memory", node, "warning", what, "state what the nodes have, and plan again", total / GIB)]
    return [Finding("memory", node, "ok", f"{found}; {needed / GIB:.1f} GiB needed: {why}", value=free / GIB)]


def _processes(number: int) -> str:
    return "one process" if number == 1 else f"{number} processes"


def memory_limit_bytes(env: Mapping[str, str] = os.environ) -> tuple[int, int, str] | None:
    """The smallest limit on this process and its kin, what they use of it, and whose it is; None: there is none."""
    limits = [*_cgroup_limits()]
    if "SLURM_MEM_PER_NODE" in env and int(env["SLURM_MEM_PER_NODE"]) > 0:
        limits.append((int(env["SLURM_MEM_PER_NODE"]) * MIB, 0, "SLURM's --mem"))
    return min(limits, key=lambda limit: limit[0] - limit[1], default=None)


def _cgroup_limits() -> Iterator[tuple[int, int, str]]:
    """Of this process' control group and those above it, in versions 1 and 2."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_file, used_file = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, used_file = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            limit, used = _number(group / limit_file), _number(group / used_file)
            # Version 1 writes the largest number of pages where there is no limit.
            if limit is not None and used is not None and limit < 2**60:
                yield limit, max(0, used - _reclaimable(group)), f"the control group {group}"


def _reclaimable(group: Path) -> int:
    """Bytes of file cache in a control group, which are given up for processes."""
    try:
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    stat = dict(line.split() for line in lines)
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def check_shared_memory(node: str, *, num_gpus: int, folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Room in /dev/shm, through which the processes of a node talk."""
    try:
        usage = shutil.disk_usage(folder)
    except FileNotFoundError:
        return [Finding("/dev/shm", node, "failed", f"{folder} is not there", _shm_fix(num_gpus), 0)]
    found = f"{usage.free / MIB:,.0f} MiB of {usage.total / MIB:,.0f} MiB free"
    least = DOCKER_SHM_BYTES if num_gpus > 1 else SHM_LEAST_BYTES
    if usage.free < least:
        what = f"{found}; at least {least / MIB:.0f} MiB needed"
        return [Finding("/dev/shm", node, "failed", what, _shm_fix(num_gpus), usage.free / MIB)]
    if num_gpus > 1 and usage.free < SHM_FOR_NCCL_BYTES:
        what = f"{found}; NCCL's guide asks for {SHM_FOR_NCCL_BYTES / MIB:,.0f} MiB"
        return [Finding("/dev/shm", node, "warning", what, _shm_fix(num_gpus), usage.free / MIB)]
    return [Finding("/dev/shm", node, "ok", found, value=usage.free / MIB)]


def _shm_fix(num_gpus: int) -> str:
    size = "1g" if num_gpus > 1 else "64m"
    return f"mount -o remount,size={size} /dev/shm; in a container --shm-size={size}; remove what is left in it"


def check_limits(node: str, *, world_size: int) -> list[Finding]:
    """Limits on open files, and on locked memory where InfiniBand is."""
    return [_open_files(node, world_size), *_locked_memory(node)]


def _open_files(node: str, world_size: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OPEN_FILES_A_PEER * world_size
    fix = f"ulimit -n {max(USUAL_OPEN_FILES, needed)} in cluster.setup or in limits.conf" + (
        f"; only root may raise it above {hard}" if hard < needed else ""
    )
    if soft < needed:
        what = f"a process may open {soft} files; {world_size} processes need {needed} each"
        return Finding("open files", node, "failed", what, fix, soft)
    if soft < USUAL_OPEN_FILES:
        return Finding("open files", node, "warning", f"a process may open only {soft} files", fix, soft)
    return Finding("open files", node, "ok", f"a process may open {soft:,} files", value=soft)


def _locked_memory(node: str) -> list[Finding]:
    if not INFINIBAND.is_dir() or not any(INFINIBAND.iterdir()):
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [Finding("locked memory", node, "ok", "not limited, as InfiniBand needs it")]
    what = f"limited to {soft / MIB:,.0f} MiB, and InfiniBand pins what it sends"
    fix = "ulimit -l unlimited in limits.conf or in slurmd's unit (LimitMEMLOCK=infinity)"
    return [Finding("locked memory", node, "failed" if soft < LOCKED_LEAST_BYTES else "warning", what, fix, soft / MIB)]


def usable_cores() -> float:
    """Cores that this process may use at a time: its affinity, and the quota of its control group."""
    return min([float(len(os.sched_getaffinity(0))), *_quotas()])


def _quotas() -> Iterator[float]:
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, read = Path("/sys/fs/cgroup"), _quota_v2
        elif "cpu" in controllers.split(","):
            root, read = Path("/sys/fs/cgroup/cpu"), _quota_v1
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            cores = read(group)
            if cores is not None:
                yield cores


def _quota_v1(group: Path) -> float | None:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return None if quota is None or period is None else quota / period


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return None if quota == "max" else int(quota) / int(period)


def check_cores(node: str, *, num_processes: int) -> list[Finding]:
    """Cores that can be used against the processes of the training."""
    cores, machine = usable_cores(), os.cpu_count()
    what = f"{cores:g} of {machine} can be used, by {_processes(num_processes)} of the training"
    if cores < num_processes:
        fix = "ask for more: cluster.cpus_per_gpu, --cpus-per-task or --cpus-per-gpu; srun takes them over only if told"
        return [Finding("cores", node, "warning", what, fix, cores)]
    return [Finding("cores", node, "ok", what, value=cores)]
