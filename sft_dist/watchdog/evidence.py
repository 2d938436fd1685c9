"""What a process that hangs can be asked: its stacks, the kernel's view of its threads, its collectives."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# Of /proc/PID/status, in words.
STATES = {"T": "stopped", "t": "traced", "D": "in an uninterruptible wait, for a disk or a device", "Z": "dead"}


def collectives() -> dict[str, int]:
    """How many collectives this rank has called, by group and device; empty without a process group.

    A group is named alike on all of its ranks. Reads counters only: safe beside a collective that hangs.
    """
    if not dist.is_initialized():
        return {}
    found = {}
    for group, by_rank in list(distributed_c10d._world.pg_group_ranks.items()):
        members = hashlib.sha256(repr(sorted(by_rank)).encode()).hexdigest()[:8]
        for device in group._device_types:
            with suppress(RuntimeError):  # no communicator yet
                backend = group._get_backend(device)
                count = backend._get_sequence_number_for_group()  # type: ignore[attr-defined]
                found[f"{group.group_name} {members} {device.type}"] = count
    return found


def dump_stacks(path: Path, heading: str) -> None:
    """Stacks of all threads, and where each of them is in the kernel.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("w", encoding="utf-8") as file:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        file.write(heading + "\n\nthreads of Python\n")
        file.writelines(f"  0x{ident:016x} {name}\n" for ident, name in names.items() if ident is not None)
        file.write("\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\nthreads in the kernel: id, state, name, what it waits in\n")
        file.writelines(f"  {line}\n" for line in kernel_threads(os.getpid()))
        file.flush()
        os.fsync(file.fileno())


def kernel_threads(pid: int) -> Iterator[str]:
    """A line for each thread; none where there is no /proc."""
    for task in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda each: int(each.name)):
        with suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            yield f"{task.name} {state} {(task / 'comm').read_text().strip()} {(task / 'wchan').read_text().strip()}"


def state_of(pid: int) -> str | None:
    """Of another process of this machine, in words; None: it runs, or is not there."""
    with suppress(OSError):
        return STATES.get(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return None


def dump_flight_recorder(path: Path) -> bool:
    """NCCL's last collectives with their state, pickled, as ``torchfrtrace`` reads them; whether there are any.

    On by default (TORCH_FR_BUFFER_SIZE, 2,000 of them). Raises ``OSError``.
    """
    if not torch.cuda.is_available() or not dist.is_initialized():
        return False
    module = torch._C._distributed_c10d
    # Private names, which differ between builds and versions; without any of them a stall is told all the same.
    dump = getattr(module, "_dump_nccl_trace", None) or getattr(module, "_dump_fr_trace", None)
    if dump is None:
        return False
    path.write_bytes(dump(includeStackTraces=True, onlyActive=False))
    return True
