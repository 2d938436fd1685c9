"""FSDP2 (``fully_shard``): every parameter is split along dimension 0; a decoder block is gathered while it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from sft_dist.config.schema import Fsdp2Sharding
from sft_dist.data.batch import MicroBatch
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.spec import ParameterSpec
from sft_dist.run import Run
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.optimizer_states import state_bytes
from sft_dist.sharding.spec import ParameterShard, ShardingSpec, chunk_numel
from sft_dist.sharding.strategy import NativeStrategy, eval_mode, store_master


def describe(run: Run, rank: int) -> ShardingSpec:
    """A chunk of dimension 0 of every parameter, frozen ones too."""

    def chunk(parameter: ParameterSpec, of_rank: int) -> int:
        return chunk_numel(parameter.shape[0], parameter.numel // parameter.shape[0], of_rank, run.world.size)

    parameters = tuple(
        ParameterShard(
            p.name, chunk(p, rank), run.precision.stored(trainable=p.trainable, strategy="fsdp2"), p.trainable
        )
        for p in run.model.parameters
    )
    trainable = sum(p.local_numel for p in parameters if p.requires_grad)
    states = sum(state_bytes(run, p, chunk(p, rank), chunk(p, 0)) for p in run.model.trainable)
    return ShardingSpec("fsdp2", rank, parameters, trainable, run.precision.master, states)


class Fsdp2(NativeStrategy):
    def __init__(self, run: Run, model: SftModel, device: torch.device) -> None:
        super().__init__(run, model)
        assert isinstance(run.sharding, Fsdp2Sharding)
        store_master(model, run)
        mesh = init_device_mesh(device.type, (run.world.size,), mesh_dim_names=("dp_shard",))
        policy = MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPES[run.precision.compute],
            reduce_dtype=TORCH_DTYPES[run.precision.reduce],
            cast_forward_inputs=False,
        )
        for block in model.blocks().values():
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=run.sharding.reshard_after_forward)
        # The root holds embedding, last norm and output layer: needed first in forward and first again in backward.
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for buffer_owner in model.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                buffer_owner._buffers[name] = buffer.to(device)
        self.optimizer = build_optimizer(run.optim, run.precision, model.named_parameters())

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
