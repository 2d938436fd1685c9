"""How fast this machine multiplies matrices: what a trainer's rate is a share of.

    python -m benchmarks.train_parts.products THREADS SIZE

Each the median of many runs; products in bf16, on a CPU without instructions for it in fp32. ``square`` is a product of
square matrices, 2,048 a side, 8,192 on a GPU. ``model`` is all products of the model's linear layers at 1,024 tokens
(4,096 on a GPU), forward and for both gradients, at their own sizes and nothing else: the time that a full fine-tuning
step cannot be below. ``memory`` is the bytes a second that a large copy reads and writes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.train_parts.sizes import SIZES, Size
from sft_dist.model.cpu_shapes import multiplies_bf16
from sft_dist.plan.benchmark import copy_rate

RUNS, COPIES = 15, 4


def rates(device: torch.device, size: Size) -> dict[str, float]:
    """By name: FLOP/s, and bytes/s of memory."""
    square, tokens = (2048, 1024) if device.type == "cpu" else (8192, 4096)
    dtype = torch.bfloat16 if device.type == "cuda" or multiplies_bf16() else torch.float32
    a, b = (torch.randn(square, square, dtype=dtype, device=device) for _ in range(2))
    found = {"square": 2 * square**3 / _median_s(lambda _: a @ b, device)}
    work = seconds = 0.0
    for inputs, outputs in set(size.linears):
        times = size.linears.count((inputs, outputs)) * size.layers
        # As many of each as a model has layers, some: else all of them stay in the caches.
        x, w, g = (
            [torch.randn(rows, columns, dtype=dtype, device=device) for _ in range(COPIES)]
            for rows, columns in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        products: tuple[Callable[[int], torch.Tensor], ...] = (
            lambda i, x=x, w=w: x[i] @ w[i].T,  # type: ignore[misc]
            lambda i, g=g, w=w: g[i] @ w[i],  # type: ignore[misc]
            lambda i, g=g, x=x: g[i].T @ x[i],  # type: ignore[misc]
        )
        for product in products:
            seconds += times * _median_s(product, device)
            work += times * 2 * tokens * inputs * outputs
    return found | {"model": work / seconds, "memory": copy_rate(device)}


def _median_s(product: Callable[[int], torch.Tensor], device: torch.device) -> float:
    def once(number: int) -> float:
        started = time.perf_counter()
        product(number % COPIES)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for number in range(COPIES):
        once(number)
    return statistics.median(once(number) for number in range(RUNS))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(rates(here, SIZES[sys.argv[2]])))
