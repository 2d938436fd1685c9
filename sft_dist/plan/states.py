"""Bytes that a rank holds between steps, counted from the description of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sft_dist.config.schema import AdamWConfig
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding import registry
from sft_dist.sharding.remember import for_alike_runs

GIB = 2**30


@dataclass(frozen=True)
class StateBytes:
    """One rank's share between steps, in bytes, without what is in host memory.

    Args:
        parameters: as stored, with all buffers (quantisation state, rotary frequencies).
        gradients: as long as they are accumulated.
        optimizer: its states, and its master weights where these are not the parameters themselves.
        paged: optimizer states in managed memory, of which the GPU holds as many pages as it has room for; not in
            ``total``.
    """

    parameters: int
    gradients: int
    optimizer: int
    paged: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@for_alike_runs
def state_bytes(run: Run) -> StateBytes:
    """Of rank 0, which holds no less than any other rank under every strategy."""
    spec = registry.describe(run, 0)
    parameters = (0 if "parameters" in spec.on_host else spec.parameter_bytes) + run.model.buffer_bytes
    if "optimizer" in spec.on_host:  # gradients go there as they are reduced
        return StateBytes(parameters, 0, 0)
    states = spec.optimizer_state_bytes
    if run.strategy not in ZERO_STAGES:
        gradients = sum(p.local_bytes for p in spec.parameters if p.requires_grad)
        if isinstance(run.optim, AdamWConfig) and run.optim.paged:
            return StateBytes(parameters, gradients, 0, paged=states)
        return StateBytes(parameters, gradients, states)
    # DeepSpeed accumulates in fp32: stage 1 whole gradients, the others what this rank's optimizer updates.
    numel = spec.optimizer_numel
    gradients = DTYPE_BYTES["fp32"] * (run.model.num_trainable if run.strategy == "zero1" else numel)
    return StateBytes(parameters, gradients, numel * DTYPE_BYTES[spec.optimizer_dtype] + states)


def with_world_size(run: Run, size: int) -> Run:
    """The same run on ``size`` ranks of one node."""
    world = replace(run.world, num_nodes=1, ranks_per_node=size)
    batch = replace(run.batch, world_size=size // run.batch.sequence_parallel)
    return replace(run, world=world, batch=batch)
