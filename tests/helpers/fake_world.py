"""One process stands for a rank of a world of any size: ``python -m tests.helpers.fake_world CONFIG RANK RANKS``.

It shards the model of a configuration without its weights, checks the shards against their description, and prints what
that took and what the rank would hold.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore


def peak_memory_bytes() -> int:
    """Of this program; what ``getrusage`` tells includes the process that started it, before it became this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def main(config: str, rank: int, ranks: int) -> None:
    from sft_dist.config.schema import Config
    from sft_dist.resolve import resolve
    from sft_dist.runtime.world import WorldShape
    from sft_dist.sharding import registry
    from sft_dist.sharding.verify import differences_of

    started = time.perf_counter()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    with open(config, encoding="utf-8") as file:
        run = resolve(Config.model_validate(yaml.safe_load(file)), WorldShape(1, ranks))
    strategy = registry.shard_without_weights(run)
    spec = registry.describe(run, rank)
    result = {
        "differences": differences_of(strategy, spec),
        "parameters": sum(p.numel for p in run.model.parameters),
        "trainable": run.model.num_trainable,
        "local_numel": sum(tensor.numel() for _, tensor, _ in strategy.local_parameters()),
        "shard_bytes": sum(tensor.nbytes for _, tensor, _ in strategy.local_parameters()),
        "described_bytes": spec.parameter_bytes,
        "buffer_bytes": run.model.buffer_bytes,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
