"""What a process takes of host memory while something runs."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_EVERY_S = 0.002


@contextmanager
def peak_anonymous_memory() -> Iterator[list[int]]:
    """A list that at the end holds the growth of memory that is neither a file's nor shared, sampled, at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would hide what this one takes
    before, peak, ended = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
        peak[0] = max(peak[0], anonymous_bytes() - before)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")
