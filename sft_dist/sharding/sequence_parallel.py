"""Which ranks share the sequence of a micro-batch, beside whichever strategy shards the parameters over all of them."""

from __future__ import annotations

import torch.distributed as dist

from sft_dist.run import Run
from sft_dist.sharding.refusal import Refusal, divisors, on_a_multiple_of, processes


def unsupported(run: Run) -> Refusal | None:
    """Why the run cannot have its ``sharding.sequence_parallel``, or None."""
    size, ranks, model = run.sharding.sequence_parallel, run.world.size, run.model
    if size == 1:
        return None
    if ranks % size:
        return Refusal(
            f"sharding.sequence_parallel {size} does not divide the run's {processes(ranks)}",
            f"set sharding.sequence_parallel to {divisors(ranks)}, or {on_a_multiple_of(size)}",
        )
    if model.num_heads % size:
        return Refusal(
            f"sharding.sequence_parallel {size} does not divide the {model.num_heads} attention heads of "
            f"{model.path}, and each of the ranks that share a sequence attends with its own",
            f"set sharding.sequence_parallel to {divisors(model.num_heads)}",
        )
    return None


def sequence_group(run: Run) -> dist.ProcessGroup | None:
    """This rank's group of consecutive ranks, which sit in one node; None where every rank has its own micro-batch.

    Every rank must call it.
    """
    size = run.sharding.sequence_parallel
    if size == 1:
        return None
    members = [list(range(first, first + size)) for first in range(0, run.world.size, size)]
    group, _ = dist.new_subgroups_by_enumeration(members)
    return group
