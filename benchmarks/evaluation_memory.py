"""Host memory of an evaluation of many short rows in one process: it must not grow with them.

    python benchmarks/evaluation_memory.py [--rows 100000] [--strategy ddp] [--method full]

The model is the demo's base. Prints the memory before, every ten thousand rows, and the peak, all in MiB of RSS.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# What a launcher would say; DeepSpeed reads it.
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}

import torch
import torch.distributed as dist

from sft_dist.data.batch import MicroBatch
from sft_dist.demo.base_model import build_base_model
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.step import evaluate
from tests.helpers import cells

MICRO_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--method", default="full", choices=cells.METHODS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        build_base_model(Path(folder), seed=0)
        train = {"global_batch_size": MICRO_BATCH, "micro_batch_size": MICRO_BATCH}
        run, strategy = cells.start(cells.config(folder, given.method, given.strategy, train=train))
        data = cells.synthetic_data(rows=given.rows, packing=False, vocab=2000)
        print(f"before: {rss_mib():.0f}", flush=True)
        watch(strategy)
        started = time.perf_counter()
        evaluate(strategy, data, run.batch, rank=0, device=cells.CPU)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"after {given.rows:,} rows, {time.perf_counter() - started:.0f} s: {rss_mib():.0f}, peak {peak:.0f}")
        strategy.close()
    dist.destroy_process_group()


def watch(strategy: Strategy) -> None:
    """Lets the strategy tell the memory while it evaluates."""
    infer, passes = strategy.evaluate, 0

    def told(batch: MicroBatch) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes * MICRO_BATCH % 10_000 == 0:
            print(f"{passes * MICRO_BATCH:,} rows: {rss_mib():.0f}", flush=True)
        return infer(batch)

    strategy.evaluate = told  # type: ignore[method-assign]


def rss_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


if __name__ == "__main__":
    main()
