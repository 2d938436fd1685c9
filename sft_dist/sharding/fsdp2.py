"""FSDP2 (``fully_shard``): every parameter is split along dimension 0; a decoder block is gathered while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sft_dist.config.schema import Fsdp2Sharding
from sft_dist.data.batch import MicroBatch
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.weights import Part, Weights, fill
from sft_dist.run import Run
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.spec import ParameterShard, ShardingSpec, chunk_numel
from sft_dist.sharding.strategy import NativeStrategy, eval_mode, store_master


def describe(run: Run, rank: int) -> ShardingSpec:
    """A chunk of dimension 0 of every parameter, frozen ones too."""
    parameters = tuple(
        ParameterShard(
            p.name,
            chunk_numel(p.shape[0], p.numel // p.shape[0], rank, run.world.size),
            run.precision.stored(trainable=p.trainable, strategy="fsdp2"),
            p.trainable,
        )
        for p in run.model.parameters
    )
    trainable = sum(p.local_numel for p in parameters if p.requires_grad)
    return ShardingSpec("fsdp2", rank, parameters, trainable, run.precision.master)


class Fsdp2(NativeStrategy):
    def __init__(self, run: Run, model: SftModel, device: torch.device, weights: Weights | None) -> None:
        super().__init__(run, model)
        assert isinstance(run.sharding, Fsdp2Sharding)
        store_master(model, run)
        mesh = init_device_mesh(
            "cpu" if weights is None else device.type, (run.world.size,), mesh_dim_names=("dp_shard",)
        )
        policy = MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPES[run.precision.compute],
            reduce_dtype=TORCH_DTYPES[run.precision.reduce],
            cast_forward_inputs=False,
        )
        for block in model.blocks().values():
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=run.sharding.reshard_after_forward)
        # The root holds embedding, last norm and output layer: needed first in forward and first again in backward.
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        if weights is not None:
            fill(model, weights, partial(_shard, device=device), device, group=mesh.get_group())
        self.optimizer = build_optimizer(run.optim, model.named_parameters(), device)

    def forward_backward(self, batch: MicroBatch, *, supervised_in_step: int, is_last_micro_batch: bool) -> Tensor:
        self.model.set_requires_gradient_sync(is_last_micro_batch)  # type: ignore[operator]
        return self._backward(self.model(batch), supervised_in_step)

    def infer(self, batch: MicroBatch, *, logits: bool) -> Tensor:
        with torch.no_grad(), eval_mode(self.model):
            result: Tensor = self.model(batch, logits=logits)
            # What stays gathered for a backward that does not come would be taken for the master weights.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            return result

    @property
    def gradients_are_sharded(self) -> bool:
        return True


@contextmanager
def _shard(meta: nn.Parameter, device: torch.device) -> Iterator[Part]:
    """The place of this rank's rows of a parameter, which FSDP2 knows as a ``DTensor`` on the meta device."""
    assert isinstance(meta, DTensor)
    shape, offset = compute_local_shape_and_global_offset(meta.shape, meta.device_mesh, meta.placements)
    local = torch.empty(shape, dtype=meta.dtype, device=device)
    sharded = DTensor.from_local(
        local, meta.device_mesh, meta.placements, run_check=False, shape=meta.shape, stride=meta.stride()
    )
    yield Part(nn.Parameter(sharded, meta.requires_grad), local.view(-1), offset[0] * math.prod(meta.shape[1:]))
