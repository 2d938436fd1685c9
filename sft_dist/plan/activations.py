"""The tape of a run's own model: what ``registry.shard`` builds, but for the sharding, with the longest micro-batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from sft_dist.data.batch import MicroBatch
from sft_dist.model.build import TORCH_DTYPES, SftModel, build_model
from sft_dist.model.compiled import use_compiled
from sft_dist.model.spec import ModelSpec
from sft_dist.plan.record import record_short, shorten
from sft_dist.plan.recorder import on_the_host
from sft_dist.plan.tape import Tape
from sft_dist.run import Run
from sft_dist.sharding.activation_checkpointing import apply_activation_checkpointing, checkpointed_blocks, to_host
from sft_dist.sharding.ddp import cast_while_running
from sft_dist.sharding.strategy import store_master


def trace(
    run: Run, *, seq_lens: tuple[int, ...] | None = None, supervised: int | None = None, backward: bool = True
) -> Tape:
    """What one micro-batch of a rank allocates and computes, forward and backward.

    Args:
        seq_lens: lengths of the rows of the micro-batch, that of all ranks that share it; by default the longest that
            there can be.
        supervised: tokens whose loss is computed; by default all of them.
        backward: False for an evaluation, which no ranks share.

    Raises:
        RuntimeError: a process group of another kind exists, and ranks share sequences.
    """
    lens = seq_lens or seq_lens_of(run)
    parts = run.batch.sequence_parallel if backward else 1
    with _group_of(parts) if parts > 1 else nullcontext():
        model, recorded = _short_model(run)
        if parts > 1:
            model.sequence_group = dist.group.WORLD
        return record_short(model, lambda: _batch(lens, parts, supervised), recorded=recorded, backward=backward)


def seq_lens_of(run: Run) -> tuple[int, ...]:
    """Lengths of the rows of the longest micro-batch: full ones, which cost attention most."""
    return (run.batch.max_seq_len,) * min(run.batch.micro_batch_size, run.batch.global_batch_size)


def _short_model(run: Run) -> tuple[SftModel, tuple[int, ...]]:
    """The run's model with the blocks to record alone, as it is before it is sharded; and what ``shorten`` says."""
    if run.activation_checkpointing.mode == "every_k":  # which blocks are recomputed depends on those that are left out
        model = build_model(run.model)
        recomputed = set(checkpointed_blocks(run.activation_checkpointing, run.model.blocks))
        kinds = [(kind, name in recomputed) for kind, name in zip(_kinds(model), model.blocks(), strict=True)]
        _apply_from_outside(run, model)
        return model, shorten(model, kinds)
    model, recorded = _shortened(run.model)
    _apply_from_outside(run, model)
    return model, recorded


# The last models that were built; a search records the same one many times.
_MOST_BUILT = 4
_built: tuple[tuple[ModelSpec, SftModel, tuple[int, ...]], ...] = ()


def _shortened(spec: ModelSpec) -> tuple[SftModel, tuple[int, ...]]:
    """A copy of the model with the blocks to record: those that are left out take most of the time to build."""
    if not any(other is spec for other, _, _ in _built):
        keep_short(spec, build_model(spec))
    model, recorded = next((model, recorded) for other, model, recorded in _built if other is spec)
    return deepcopy(model), recorded


def keep_short(spec: ModelSpec, model: SftModel) -> None:
    """Keeps the blocks to record of a model that was built anyway, for its ``trace``; ``model`` loses the others."""
    global _built
    _built = ((spec, model, shorten(model, _kinds(model))), *_built[: _MOST_BUILT - 1])


def _apply_from_outside(run: Run, model: SftModel) -> None:
    """What a strategy does to the model beside sharding it; under fsdp2 and ZeRO a module sees ``compute`` alone."""
    if run.compile:
        use_compiled(model)
    apply_activation_checkpointing(model, run.activation_checkpointing, to_host=on_the_host(to_host))
    if run.strategy == "ddp":
        store_master(model, run)
        if run.precision.master != run.precision.compute:
            cast_while_running(model, TORCH_DTYPES[run.precision.compute])


def _kinds(model: SftModel) -> list[object]:
    """What each block is like: its parameters, and what it sees."""
    return [
        (
            tuple((n, tuple(p.shape), p.requires_grad) for n, p in block.named_parameters()),
            tuple((n, tuple(b.shape)) for n, b in block.named_buffers()),
            tuple(_windows(block)),
        )
        for block in model.blocks().values()
    ]


def _windows(block: nn.Module) -> Iterator[int | None]:
    return (vars(m)["sliding_window"] for m in block.modules() if "sliding_window" in vars(m))


def _batch(seq_lens: tuple[int, ...], parts: int, supervised: int | None) -> MicroBatch:
    """A micro-batch without values; where ranks share it, the part of the first, which has no fewer tokens."""
    tokens = sum(seq_lens)
    here = -(-tokens // parts)
    share = min(here, here if supervised is None else -(-supervised // parts))

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    return MicroBatch(
        input_ids=integers(1, here),
        position_ids=integers(1, here),
        cu_seqlens=torch.empty(len(seq_lens) + 1, dtype=torch.int32),
        supervised_index=integers(share),
        labels=integers(share),
        seq_lens=seq_lens,
        split=None if parts == 1 else tuple(tokens // parts + (i < tokens % parts) for i in range(parts)),
    )


@contextmanager
def _group_of(size: int) -> Iterator[None]:
    """A process group whose other ranks are not there: what is exchanged has its sizes, and no values."""
    hook = sys.excepthook  # torch puts one over it that names rank 0, and leaves it there
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
