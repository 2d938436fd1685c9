"""FSDP2 (``fully_shard``): every parameter is split along dimension 0; a decoder block is gathered while it runs.

Embedding, last norm and output layer, which are needed at both ends of a pass, are gathered once a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sft_dist.config.schema import Fsdp2Sharding
from sft_dist.data.batch import MicroBatch
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.row_cache import RowCache
from sft_dist.model.spec import ParameterSpec
from sft_dist.model.weights import Part, Weights, fill
from sft_dist.run import Run
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.optimizer_states import state_bytes
from sft_dist.sharding.refusal import Refusal, divisors, on_a_multiple_of, processes
from sft_dist.sharding.spec import HostPart, ParameterShard, ShardingSpec, chunk_numel
from sft_dist.sharding.strategy import NativeStrategy, eval_mode, store_master

ON_HOST: frozenset[HostPart] = frozenset({"parameters", "optimizer"})


def describe(run: Run, rank: int) -> ShardingSpec:
    """A chunk of dimension 0 of every parameter, frozen ones too; ranks of one replica follow each other."""
    sharding = _settings(run)
    num_shards = run.world.size // sharding.dp_replicate

    def chunk(parameter: ParameterSpec, shard: int) -> int:
        return chunk_numel(parameter.shape[0], parameter.numel // parameter.shape[0], shard, num_shards)

    shard = rank % num_shards
    parameters = tuple(
        ParameterShard(
            p.name, chunk(p, shard), run.precision.stored(trainable=p.trainable, strategy="fsdp2"), p.trainable
        )
        for p in run.model.parameters
    )
    trainable = sum(p.local_numel for p in parameters if p.requires_grad)
    states = sum(state_bytes(run, p, chunk(p, shard), chunk(p, 0)) for p in run.model.trainable)
    on_host: frozenset[HostPart] = ON_HOST if sharding.cpu_offload else frozenset()
    return ShardingSpec("fsdp2", rank, parameters, trainable, run.precision.master, states, on_host)


def unsupported(run: Run) -> Refusal | None:
    """Why FSDP2 cannot do what the run asks for, or None."""
    replicas, size = _settings(run).dp_replicate, run.world.size
    if size % replicas:
        return Refusal(
            f"sharding.dp_replicate is {replicas}, which does not divide the run's {processes(size)}",
            f"set sharding.dp_replicate to {divisors(size)}, or {on_a_multiple_of(replicas)}",
        )
    return None


def _settings(run: Run) -> Fsdp2Sharding:
    assert isinstance(run.sharding, Fsdp2Sharding)
    return run.sharding


class Fsdp2(NativeStrategy):
    def __init__(self, run: Run, model: SftModel, device: torch.device, weights: Weights | None) -> None:
        super().__init__(run, model)
        self.sharding = _settings(run)
        store_master(model, run)
        # A mesh has to be of a real device; a model that stays on the meta device needs no more than its shape.
        self.mesh = device_mesh(run, "cpu" if weights is None else device.type)
        policy = MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPES[run.precision.compute],
            reduce_dtype=TORCH_DTYPES[run.precision.reduce],
            cast_forward_inputs=False,
        )
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self.sharding.cpu_offload else OffloadPolicy()
        shard = partial(fully_shard, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        for block in model.blocks().values():
            shard(block, reshard_after_forward=self.sharding.reshard_after_forward)
        # The root holds embedding, last norm and output layer: needed first in forward and first again in backward.
        self.root: FSDPModule = shard(model, reshard_after_forward=False)
        if weights is not None:
            home = torch.device("cpu") if self.sharding.cpu_offload else device
            fill(model, weights, partial(_shard, device=home), device, group=self.shard_group)
        self.optimizer = build_optimizer(run.optim, run.precision, model.named_parameters())

    def forward_backward(self, batch: MicroBatch, *, supervised_in_step: int, is_last_micro_batch: bool) -> Tensor:
        # What stays gathered from forward to backward in any case stays so for the step: nothing changes it before its
        # update, and the most that is held at a time is the same.
        keeps_blocks = not self.sharding.reshard_after_forward
        self.root.set_reshard_after_backward(is_last_micro_batch, recurse=keeps_blocks)
        # Gradients that wait for the last micro-batch are whole on every rank: only where it is asked for.
        self.root.set_requires_gradient_sync(is_last_micro_batch or not self.sharding.reduce_once_a_step)
        return self._forward_backward(self.model, batch, supervised_in_step)

    def infer(self, batch: MicroBatch, *, logits: bool, cache: RowCache | None = None) -> Tensor:
        with torch.no_grad(), eval_mode(self.model):
            result: Tensor = self.model(batch, logits=logits, cache=cache)
            # What stays gathered for a backward that does not come would be taken for the master weights.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            return result

    @property
    def shard_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("dp_shard")

    def parts_on_host(self) -> frozenset[HostPart]:
        groups = [m._get_fsdp_state()._fsdp_param_group for m in self.model.modules() if isinstance(m, FSDPModule)]
        offloaded = [isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups if group is not None]
        return ON_HOST if all(offloaded) else frozenset()


def device_mesh(run: Run, device_type: str) -> DeviceMesh:
    """``dp_shard``, or ``dp_replicate`` x ``dp_shard``: row i holds the ranks of replica i."""
    replicas, size = _settings(run).dp_replicate, run.world.size
    if replicas == 1:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device_type, (replicas, size // replicas), mesh_dim_names=("dp_replicate", "dp_shard"))


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
