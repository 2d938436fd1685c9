"""What travels between the ranks in an optimizer step under each strategy, as arithmetic: it needs no process group.

What is left out: single numbers (gradient norms, sums of losses, DeepSpeed's overflow flag), which take a latency each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sft_dist.config.deepspeed import Zero3Knobs, Zero12Knobs
from sft_dist.config.schema import Fsdp2Sharding
from sft_dist.model.sequence_parallel import shared_kv_heads
from sft_dist.model.spec import DTYPE_BYTES, ParameterSpec
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding.activation_checkpointing import checkpointed_blocks
from sft_dist.sharding.optim import Group as OptimizerGroup
from sft_dist.sharding.optim import group_of
from sft_dist.sharding.ring import Kind, ring_factor
from sft_dist.sharding.zero import PARTITION_ALIGNMENT

Pass = Literal["forward", "backward", "step"]
Every = Literal["micro_batch", "first_micro_batch", "last_micro_batch", "step"]

# DistributedDataParallel's defaults: the first bucket is smaller, so that something travels early.
DDP_FIRST_BUCKET_BYTES, DDP_BUCKET_BYTES = 2**20, 25 * 2**20


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something.

    Args:
        kind: ``shard`` and ``replica`` are the two dimensions of FSDP2's mesh.
        size: its ranks.
        per_node: how many of them sit in one node.
    """

    kind: Literal["shard", "replica", "world", "sequence"]
    size: int
    per_node: int

    @property
    def crosses_nodes(self) -> bool:
        return self.size > self.per_node


@dataclass(frozen=True)
class Collective:
    """One collective of every rank.

    Args:
        size_bytes: of the whole tensor: gathered, reduced, or what one rank sends and keeps in an all-to-all.
        of: the pass that it belongs to.
        every: how often: in each micro-batch, in the first or the last one only, or once a step behind them.
        block: index of the decoder block that it is of; None: what is before and behind the blocks.
        overlaps: whether computation goes on meanwhile.
        copied_bytes: that the GPU reads and writes around it, to and from the buffers that travel.
    """

    kind: Kind
    size_bytes: int
    group: Group
    of: Pass
    every: Every
    block: int | None
    overlaps: bool = True
    copied_bytes: int = 0

    def times(self, micro_batches: int) -> int:
        """How often there is one in a step of so many."""
        return micro_batches if self.every == "micro_batch" else 1


def collectives(run: Run, *, tokens: int | None = None) -> tuple[Collective, ...]:
    """Every collective of a step, in the order of a pass; a micro-batch has those of each pass once.

    Args:
        tokens: of a micro-batch, where ranks share it; by default the most there can be.
    """
    if run.world.size == 1:
        return ()
    match run.strategy:
        case "ddp":
            found = list(_ddp(run))
        case "fsdp2":
            found = list(_fsdp2(run))
        case "zero3":
            found = list(_zero3(run))
        case _:
            found = list(_zero12(run))
    if run.batch.sequence_parallel > 1:
        most = run.batch.micro_batch_size * run.batch.max_seq_len
        found.extend(_sequence_parallel(run, most if tokens is None else tokens))
    return tuple(found)


def of_evaluation(found: Iterable[Collective]) -> tuple[Collective, ...]:
    """Those of a forward pass without gradients, in which no ranks share a sequence."""
    return tuple(c for c in found if c.of == "forward" and c.group.kind != "sequence")


def members(run: Run, block: int | None) -> list[ParameterSpec]:
    """Parameters of a block, or of what is before and behind them."""
    return run.model.members[None if block is None else run.model.blocks[block]]


def padded_numel(parameter: ParameterSpec, shards: int) -> int:
    """Elements of a parameter with dimension 0 padded, so that FSDP2's chunks are equally long."""
    return -(-parameter.shape[0] // shards) * shards * (parameter.numel // parameter.shape[0])


def blocks_with_backward(run: Run) -> range:
    """Blocks that gradients run through: from the first that trains, or all if something before them does."""
    seen_block = False
    for parameter in run.model.parameters:
        seen_block = seen_block or parameter.block is not None
        if not parameter.trainable:
            continue
        if parameter.block is not None:
            return range(run.model.blocks.index(parameter.block), run.model.num_layers)
        if not seen_block or parameter.name.startswith("prompt."):
            return range(run.model.num_layers)
    return range(run.model.num_layers, run.model.num_layers)


def world_group(world: WorldShape) -> Group:
    return Group("world", world.size, world.ranks_per_node)


def ddp_buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of gradients by bucket, in the order in which they come (``compute_bucket_assignment_by_size``).

    Args:
        sizes: bytes of each gradient.
    """
    buckets: list[list[int]] = []
    open_bucket: list[int] = []
    for index, _ in enumerate(sizes):
        open_bucket.append(index)
        limit = DDP_BUCKET_BYTES if buckets else DDP_FIRST_BUCKET_BYTES
        if sum(sizes[i] for i in open_bucket) >= limit:
            buckets.append(open_bucket)
            open_bucket = []
    return [*buckets, open_bucket] if open_bucket else buckets


def _ddp(run: Run) -> Iterator[Collective]:
    """Gradients by bucket in the last micro-batch, last parameters first; inside a block the order is autograd's."""
    world, blocks = world_group(run.world), run.model.blocks
    arriving = list(reversed(run.model.trainable))
    master, reduce = DTYPE_BYTES[run.precision.master], DTYPE_BYTES[run.precision.reduce]
    for bucket in ddp_buckets([p.numel * master for p in arriving]):
        numel, last = sum(arriving[i].numel for i in bucket), arriving[bucket[-1]].block
        index = None if last is None else blocks.index(last)
        yield Collective("all_reduce", numel * reduce, world, "backward", "last_micro_batch", index)


def _fsdp2(run: Run) -> Iterator[Collective]:
    """A block is gathered in forward, again in backward if it was freed, and reduced in every micro-batch or the last.

    What is not freed after forward stays gathered for the step: the root, and with it blocks if they are kept.
    """
    assert isinstance(run.sharding, Fsdp2Sharding)
    replicas, per_node = run.sharding.dp_replicate, run.world.ranks_per_node
    frees_blocks = run.sharding.reshard_after_forward
    shards = run.world.size // replicas
    shard = Group("shard", shards, min(shards, per_node))
    replica = Group("replica", replicas, max(1, min(replicas, per_node // shards)))
    compute, reduce = DTYPE_BYTES[run.precision.compute], DTYPE_BYTES[run.precision.reduce]
    units = [None, *range(run.model.num_layers)]
    whole = {unit: sum(padded_numel(p, shards) for p in members(run, unit)) * compute for unit in units}
    needed = blocks_with_backward(run)
    # The one before is fetched ahead, whether or not it is needed.
    again = range(max(0, needed.start - 1), needed.stop) if needed and frees_blocks else range(0)

    every: Every = "last_micro_batch" if run.sharding.reduce_once_a_step else "micro_batch"
    copied_width = compute + reduce  # bytes read and written of a gradient, into the buffer
    others = run.batch.gradient_accumulation_steps - 1
    if run.sharding.reduce_once_a_step and others:
        # Made ``reduce`` in the first micro-batch, added to in the others, and copied into the buffer as such.
        to_reduce = 0 if compute == reduce else compute + reduce
        copied_width = to_reduce + others * (compute + 2 * reduce) + 2 * reduce

    def gather(size: int, of: Pass, unit: int | None) -> Collective:
        """Into one buffer, out of which the unit's weights are copied."""
        when: Every = "micro_batch" if unit is not None and frees_blocks else "first_micro_batch"
        return Collective("all_gather", size, shard, of, when, unit, copied_bytes=2 * size)

    if shards > 1:
        for unit in units:
            yield gather(whole[unit], "forward", unit)
    for unit in (*reversed(range(run.model.num_layers)), None):
        if unit in again and shards > 1:
            yield gather(whole[unit], "backward", unit)
        numel = sum(padded_numel(p, shards) for p in members(run, unit) if p.trainable)
        reduced = numel * reduce
        if reduced and shards > 1:
            copied = numel * copied_width
            yield Collective("reduce_scatter", reduced, shard, "backward", every, unit, copied_bytes=copied)
        if reduced and replicas > 1:
            yield Collective("all_reduce", reduced // shards, replica, "backward", every, unit)


def _zero12(run: Run) -> Iterator[Collective]:
    """Gradients are reduced in buckets, in stage 1 in the last micro-batch only; updated weights are gathered.

    DeepSpeed reduces a bucket on all ranks, also where each keeps its part only, unless
    ``use_multi_rank_bucket_allreduce`` is off. ``BF16_Optimizer`` reduces when backward has ended.
    """
    world, knobs = world_group(run.world), run.deepspeed
    assert isinstance(knobs, Zero12Knobs)
    reduce = DTYPE_BYTES[run.precision.reduce]
    every: Literal["micro_batch", "last_micro_batch"] = "micro_batch" if run.strategy == "zero2" else "last_micro_batch"
    at_once = run.strategy == "zero1" and run.precision.compute == "bf16"
    overlaps = knobs.overlap_comm in (None, True) and not at_once
    everywhere = at_once or knobs.use_multi_rank_bucket_allreduce or not knobs.reduce_scatter
    kind: Kind = "all_reduce" if everywhere else "reduce"
    for numel, block in _reduce_buckets(run, knobs.reduce_bucket_size, [p.numel for p in run.model.trainable]):
        yield Collective(kind, numel * reduce, world, "backward", every, block, overlaps)
    compute, unit = DTYPE_BYTES[run.precision.compute], PARTITION_ALIGNMENT * run.world.size
    sizes: Counter[OptimizerGroup] = Counter()
    for p in run.model.trainable:
        sizes[group_of(p.name, len(p.shape), run.optim)] += p.numel
    for size in sizes.values():
        yield Collective("all_gather", -(-size // unit) * unit * compute, world, "step", "step", None, False)


def _zero3(run: Run) -> Iterator[Collective]:
    """Weights are gathered in forward and again in backward, gradients reduced in buckets, in every micro-batch.

    Gathers in backward are an upper bound: DeepSpeed keeps a weight that it needs again within
    ``stage3_max_reuse_distance`` elements, so that a small model whose weights all train is gathered once.
    """
    world, knobs = world_group(run.world), run.deepspeed
    assert isinstance(knobs, Zero3Knobs)
    compute, ranks = DTYPE_BYTES[run.precision.compute], run.world.size
    overlaps = knobs.overlap_comm in (None, True)
    units: list[int | None] = [None, *range(run.model.num_layers)]
    whole = {unit: sum(-(-p.numel // ranks) * ranks for p in members(run, unit)) * compute for unit in units}
    needed = blocks_with_backward(run)
    for unit in units:
        yield Collective("all_gather", whole[unit], world, "forward", "micro_batch", unit)
    if not zero3_keeps_all(run):
        for block in reversed(needed):
            yield Collective("all_gather", whole[block], world, "backward", "micro_batch", block)
    padded = [-(-p.numel // ranks) * ranks for p in run.model.trainable]
    reduce = DTYPE_BYTES[run.precision.reduce]
    for numel, ends_in in _reduce_buckets(run, knobs.reduce_bucket_size, padded):
        yield Collective("reduce_scatter", numel * reduce, world, "backward", "micro_batch", ends_in, overlaps)


def zero3_keeps_all(run: Run) -> bool:
    """Whether stage 3 keeps what it has gathered from forward to backward: all trains, and all is within its reach."""
    knobs = run.deepspeed
    assert isinstance(knobs, Zero3Knobs)
    numel = sum(p.numel for p in run.model.parameters)
    reach = min(knobs.stage3_max_reuse_distance, knobs.stage3_max_live_parameters)
    return numel <= reach and all(p.trainable for p in run.model.parameters)


def _reduce_buckets(run: Run, capacity: int, numels: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """(elements, block of the last one) of DeepSpeed's buckets, which are reduced before they would overflow.

    Args:
        numels: of the parameters that train, in the model's order.
    """
    filled = 0
    block: int | None = None
    for parameter, numel in zip(reversed(run.model.trainable), reversed(numels), strict=True):
        if filled and filled + numel > capacity:
            yield filled, block
            filled = 0
        filled += numel
        block = None if parameter.block is None else run.model.blocks.index(parameter.block)
    if filled:
        yield filled, block


def _sequence_parallel(run: Run, tokens: int) -> Iterator[Collective]:
    """Two all-to-alls around each attention, and the same in backward, once more where the block is recomputed."""
    size, model = run.batch.sequence_parallel, run.model
    group = Group("sequence", size, min(size, run.world.ranks_per_node))
    width = model.head_dim * DTYPE_BYTES[run.precision.compute]
    here = -(-tokens // size)
    sent = here * (model.num_heads + 2 * shared_kv_heads(model.num_kv_heads, size)) * width
    back = tokens * (model.num_heads // size) * width
    recomputed = set(checkpointed_blocks(run.activation_checkpointing, model.blocks))
    needed = blocks_with_backward(run)
    for block, name in enumerate(model.blocks):
        for each in (sent, back):
            exchange = Collective("all_to_all", each, group, "forward", "micro_batch", block, overlaps=False)
            yield exchange
            if block in needed:
                again = replace(exchange, of="backward")
                yield from (again,) * (2 if name in recomputed else 1)


def total_bytes(found: Iterable[Collective], *, micro_batches: int) -> int:
    """Bytes that a rank sends in a step."""
    sent = (c.size_bytes * ring_factor(c.kind, c.group.size) * c.times(micro_batches) for c in found)
    return math.ceil(sum(sent))
