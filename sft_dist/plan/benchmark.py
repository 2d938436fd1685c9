"""What a device does in a second: products, copies and collectives, measured one by one.

The best product of several shapes counts, as in the Maximum Achievable Matmul FLOPS finder that the table's figures
come from (github.com/stas00/ml-engineering, compute/accelerator/benchmarks).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

from sft_dist.hardware.gpus import ComputeDtype
from sft_dist.sharding.ring import Kind, ring_factor

GIB = 2**30

# (m, n, k): of hidden sizes and MLPs from 7B to 70B, over 4,096 to 16,384 tokens.
SHAPES = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16384, 8192, 8192),
    (8192, 28672, 8192),
    (16384, 16384, 4096),
)
COPY_BYTES = GIB
COLLECTIVE_BYTES = GIB // 2
REPEATS, WARM_UP = 20, 3


def best_product(
    device: torch.device,
    dtype: ComputeDtype,
    *,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    repeats: int = REPEATS,
) -> float:
    """FLOP/s of the fastest of some matrix products [m, k] x [k, n]; 2 m n k FLOPs each."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    best = 0.0
    with _tf32(allowed=dtype == "tf32"):
        for m, n, k in shapes:
            left = torch.randn(m, k, device=device, dtype=torch_dtype)
            right = torch.randn(n, k, device=device, dtype=torch_dtype).t()
            out = torch.empty(m, n, device=device, dtype=torch_dtype)
            seconds = median_seconds(device, partial(torch.mm, left, right, out=out), repeats=repeats)
            best = max(best, 2 * m * n * k / seconds)
    return best


def copy_rate(device: torch.device, *, size_bytes: int = COPY_BYTES, repeats: int = REPEATS) -> float:
    """Bytes/s of the device's memory, read and written, in a copy of so many bytes."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / median_seconds(device, lambda: target.copy_(source), repeats=repeats)


def ring_rate(device: torch.device, kind: Kind, *, size_bytes: int = COLLECTIVE_BYTES, repeats: int = REPEATS) -> float:
    """Bytes/s that one of the group's processes sends in an all-gather or all-reduce, in one direction: bus bandwidth.

    Every process of the default group calls it.

    Args:
        size_bytes: of the whole tensor.
    """
    size = dist.get_world_size()
    whole = torch.zeros(size_bytes // 4 // size * size, dtype=torch.float32, device=device)
    part = whole.chunk(size)[dist.get_rank()].clone()

    def gather() -> None:
        dist.all_gather_into_tensor(whole, part)

    def reduce() -> None:
        dist.all_reduce(whole)

    dist.barrier()
    seconds = median_seconds(device, gather if kind == "all_gather" else reduce, repeats=repeats)
    return whole.numel() * whole.element_size() * ring_factor(kind, size) / seconds


def median_seconds(device: torch.device, work: Callable[[], object], *, repeats: int) -> float:
    """Of one call of ``work``, which is called a few times before."""
    for _ in range(WARM_UP):
        work()
    return statistics.median(_timed(device, work) for _ in range(repeats))


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
