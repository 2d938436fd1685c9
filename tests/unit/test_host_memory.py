"""What becomes of host memory that is freed."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes, resource, sys
from sft_dist.runtime.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def allocate():
    held = [libc.malloc(8 << 20) for _ in range(16)]
    for each in held:
        libc.memset(each, 1, 8 << 20)
    for each in held:
        libc.free(each)

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(5):
    allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES_OF_A_ROUND = 16 * (8 << 20) // 4096


def faults(mode: str) -> int:
    """Pages that the system had to give to five rounds of the same allocations."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


def test_what_is_freed_is_allocated_again_without_the_system() -> None:
    assert faults("plain") > 4 * PAGES_OF_A_ROUND
    assert faults("keep") < PAGES_OF_A_ROUND / 10
