"""Memory of the device that one process has to itself, and host memory that it has freed."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch
import torch.distributed as dist

from sft_dist.runtime.world import World

# Of glibc's malloc.h, and the largest size that it takes for the second.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_MMAP_THRESHOLD = 32 * 2**20


def memory_bytes(world: World, device: torch.device) -> int:
    """All memory of this rank's GPU; on a CPU, the machine's divided by the processes on this node."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical // world.shape.ranks_per_node


def least_memory_bytes(world: World, device: torch.device, store: dist.Store) -> int:
    """The smallest ``memory_bytes`` of all ranks, on every rank: what is decided by it must be decided alike.

    Every rank calls it, before there is a process group.
    """
    store.set(f"memory of {world.rank}", str(memory_bytes(world, device)))
    return min(int(store.get(f"memory of {rank}")) for rank in range(world.size))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def most_allocated_bytes(device: torch.device) -> int | None:
    """Most bytes that torch's allocator of any rank has handed out; None on a CPU, which does not count them.

    Every rank calls it.
    """
    if device.type != "cuda":
        return None
    most = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def keep_freed_memory() -> None:
    """Lets host memory that is freed stay with the process: what a step frees, the next one allocates.

    glibc hands large tensors back to the system, which fills every page with zeros before it gives it again; that is
    several per cent of a step on a CPU. Tensors of more than 32 MiB are handed back in any case. Other allocators are
    left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Hands freed host memory back to the system.

    glibc keeps what lies between allocations that live on. Freeing large temporary tensors between small ones that stay
    leaves a process with several times what it uses. Other allocators are left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
