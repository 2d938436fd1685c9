"""DDP: every rank holds the whole model; gradients are all-reduced in the last micro-batch's backward."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sft_dist.data.batch import MicroBatch
from sft_dist.data.loader import Part, empty_micro_batch
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.lora import readers
from sft_dist.model.row_cache import RowCache
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.model.weights import Weights, fill
from sft_dist.run import Run
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.optimizer_states import state_bytes
from sft_dist.sharding.spec import ParameterShard, ShardingSpec
from sft_dist.sharding.strategy import NativeStrategy, eval_mode, store_master, whole_parameter


def describe(run: Run, rank: int) -> ShardingSpec:
    """Everything on every rank."""
    parameters = tuple(
        ParameterShard(p.name, p.numel, run.precision.stored(trainable=p.trainable, strategy="ddp"), p.trainable)
        for p in run.model.parameters
    )
    states = sum(state_bytes(run, p, p.numel, p.numel) for p in run.model.trainable)
    return ShardingSpec("ddp", rank, parameters, run.model.num_trainable, run.precision.master, states)


def has_reducer(run: Run) -> bool:
    """Whether gradients go through DDP's buckets, which stay from step to step.

    A single rank has nothing to reduce, and its gradients need no copy in a bucket; unless they are to be rounded.
    """
    return run.world.size > 1 or DTYPE_BYTES[run.precision.reduce] < DTYPE_BYTES[run.precision.master]


class Ddp(NativeStrategy):
    def __init__(self, run: Run, model: SftModel, device: torch.device, weights: Weights) -> None:
        super().__init__(run, model)
        store_master(model, run)
        fill(model, weights, partial(whole_parameter, device=device), device, group=None)
        if run.precision.master != run.precision.compute:
            cast_while_running(model, TORCH_DTYPES[run.precision.compute])
        self.ddp: DistributedDataParallel | None = None
        if has_reducer(run):
            # Buffers are constants here, the same on every rank.
            self.ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if run.precision.reduce != run.precision.master:
                self.ddp.register_comm_hook(TORCH_DTYPES[run.precision.reduce], reduce_in_dtype)
        self.optimizer = build_optimizer(run.optim, run.precision, model.named_parameters())
        if self.ddp is not None:
            self._settle_buckets(run, device)

    def _settle_buckets(self, run: Run, device: torch.device) -> None:
        """Lets DDP order its buckets, which it does once, after its first backward, as gradients came.

        From three ranks on, the order in which a gradient is added up depends on its place in a bucket: a resumed run,
        whose buckets are as new in another step, would not have the bits of the uninterrupted one.
        """
        sharers = run.batch.sequence_parallel
        empty = empty_micro_batch(Part(dist.get_rank() % sharers, sharers))
        self.forward_backward(empty.to(device), supervised_in_step=1, is_last_micro_batch=True)
        self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self, batch: MicroBatch, *, supervised_in_step: int, is_last_micro_batch: bool) -> Tensor:
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = is_last_micro_batch
        return self._forward_backward(self.model if self.ddp is None else self.ddp, batch, supervised_in_step)

    def infer(self, batch: MicroBatch, *, logits: bool, cache: RowCache | None = None) -> Tensor:
        with torch.no_grad(), eval_mode(self.model):
            result: Tensor = self.model(batch, logits=logits, cache=cache)
            return result

    @property
    def shard_group(self) -> None:
        return None


def cast_while_running(model: nn.Module, dtype: torch.dtype) -> None:
    """Lets every module compute with its trainable parameters cast to ``dtype``, as FSDP2's gather does.

    While a module runs, the cast shadows the parameter as a plain attribute. Hooks rather than autocast, so that the
    same tensors are in the same dtype under every strategy; and they run again when a block is recomputed.
    """
    for reader, owners in readers(model):
        cast = [
            (owner, name) for owner in owners for name, p in owner.named_parameters(recurse=False) if p.requires_grad
        ]
        if cast:
            reader.register_forward_pre_hook(_shadow(cast, dtype))
            reader.register_forward_hook(_unshadow(cast), always_call=True)


def _shadow(cast: list[tuple[nn.Module, str]], dtype: torch.dtype):  # type: ignore[no-untyped-def]
    def hook(_reader: nn.Module, _inputs: object) -> None:
        for owner, name in cast:
            owner.__dict__[name] = owner._parameters[name].to(dtype)  # type: ignore[union-attr]

    return hook


def _unshadow(cast: list[tuple[nn.Module, str]]):  # type: ignore[no-untyped-def]
    def hook(_reader: nn.Module, _inputs: object, _output: object) -> None:
        for owner, name in cast:
            owner.__dict__.pop(name, None)

    return hook


def reduce_in_dtype(dtype, bucket):  # type: ignore[no-untyped-def]
    """A DDP communication hook: averages a bucket in ``dtype`` and hands it back in its own.

    Without annotations, because DDP compares them with its types and sees strings here.
    """
    buffer = bucket.buffer()
    cast = buffer.to(dtype).div_(dist.get_world_size())
    future = dist.all_reduce(cast, async_op=True).get_future()
    return future.then(lambda f: buffer.copy_(f.value()[0]))
