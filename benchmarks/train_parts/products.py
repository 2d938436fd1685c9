"""How fast this machine multiplies matrices: what a trainer's rate is a share of.

    python -m benchmarks.train_parts.products THREADS

Two rates in bf16, each the median of many runs. ``square`` is a product of 2048 x 2048 matrices. ``model`` is all
products of the model's linear layers at 1,024 tokens, forward and for both gradients, at their own sizes and nothing
else: the time that a full fine-tuning step cannot be below.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.train_parts.workload import HEADS, HIDDEN, KV_HEADS, LAYERS, WIDE

SQUARE, TOKENS, RUNS, COPIES = 2048, 1024, 15, 4


def rates(device: torch.device) -> dict[str, float]:
    """FLOP/s by name."""
    a, b = (torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16, device=device) for _ in range(2))
    found = {"square": 2 * SQUARE**3 / _median_s(lambda _: a @ b, device)}
    kv = HIDDEN * KV_HEADS // HEADS
    layers = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, kv)] * 2 + [(HIDDEN, WIDE)] * 2 + [(WIDE, HIDDEN)]
    work = seconds = 0.0
    for inputs, outputs in set(layers):
        times = layers.count((inputs, outputs)) * LAYERS
        # As many of each as a model has layers, some: else all of them stay in the caches.
        x, w, g = (
            [torch.randn(rows, columns, dtype=torch.bfloat16, device=device) for _ in range(COPIES)]
            for rows, columns in ((TOKENS, inputs), (outputs, inputs), (TOKENS, outputs))
        )
        products: tuple[Callable[[int], torch.Tensor], ...] = (
            lambda i, x=x, w=w: x[i] @ w[i].T,  # type: ignore[misc]
            lambda i, g=g, w=w: g[i] @ w[i],  # type: ignore[misc]
            lambda i, g=g, x=x: g[i].T @ x[i],  # type: ignore[misc]
        )
        for product in products:
            seconds += times * _median_s(product, device)
            work += times * 2 * TOKENS * inputs * outputs
    return found | {"model": work / seconds}


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
    print(json.dumps(rates(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
