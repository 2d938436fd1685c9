"""What every rank takes for the memory of a device: the least of all, or they would choose differently."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from sft_dist.runtime import memory
from sft_dist.runtime.world import World as Ranks
from sft_dist.runtime.world import WorldShape
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

CPU = torch.device("cpu")


def least_of_uneven_ranks() -> int:
    ranks = Ranks.from_environment()
    with patch.object(memory, "memory_bytes", lambda *_: (80 - ranks.rank) * 2**30):
        return memory.least_memory_bytes(ranks, CPU, dist.PrefixStore("least", _get_default_store()))


def test_the_least_counts_everywhere(world: World) -> None:
    assert world(2).run(least_of_uneven_ranks) == [79 * 2**30] * 2


def test_processes_of_a_node_share_its_memory() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.memory_bytes(Ranks(0, 0, WorldShape(1, 1)), CPU) == whole
    assert memory.memory_bytes(Ranks(0, 0, WorldShape(2, 4)), CPU) == whole // 4
