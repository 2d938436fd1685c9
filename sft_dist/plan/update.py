"""What the optimizer's step takes for a moment, beside weights, gradients and states."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sft_dist.config.deepspeed import Zero3Knobs
from sft_dist.config.schema import AdamWConfig
from sft_dist.model.build import TORCH_DTYPES
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.record import recording
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding import registry
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.remember import for_alike_runs


@for_alike_runs
def update_bytes(run: Run) -> int:
    """Most that a step of the run's optimizer allocates and frees again, on a device; 0 where it steps on the host."""
    spec = registry.describe(run, 0)
    if "optimizer" in spec.on_host:
        return 0
    own = _traced(run)
    if run.strategy in ZERO_STAGES:
        numel = spec.optimizer_numel
        if isinstance(run.deepspeed, Zero3Knobs):
            # A sub-group's gradients are made one flat fp32 tensor before it steps.
            return own + DTYPE_BYTES["fp32"] * min(numel, run.deepspeed.sub_group_size)
        if run.strategy == "zero2" or run.precision.compute == "fp32":
            return own + DTYPE_BYTES["fp32"] * numel
    return own


def _traced(run: Run) -> int:
    """Of the optimizer over this rank's shards, stepped on tensors without data.

    The fused AdamW works in place. Those that go through one parameter after another need most for the largest; SGD
    takes all in one call.
    """
    if isinstance(run.optim, AdamWConfig):
        if run.precision.optimizer_state == "8bit" or run.optim.paged:
            return 0
        if run.precision.master == run.precision.optimizer_state == "fp32" or run.strategy in ZERO_STAGES:
            return 0
    shards = [(p, s) for p, s in zip(run.model.parameters, registry.describe(run, 0).parameters, strict=True)]
    trained = sorted((p for p in shards if p[0].trainable and p[1].local_numel), key=lambda p: -p[1].local_numel)
    chosen = trained if run.optim.type == "sgd" else trained[:1]
    with FakeTensorMode():
        named = []
        for spec, shard in chosen:
            rows = shard.local_numel // (spec.numel // spec.shape[0])
            tensor = torch.empty(rows, *spec.shape[1:], dtype=TORCH_DTYPES[shard.dtype])
            parameter = nn.Parameter(tensor)
            parameter.grad = torch.empty_like(tensor)
            named.append((spec.name, parameter))
        optimizer = build_optimizer(run.optim, run.precision, named)
        optimizer.step()  # makes the states
        with recording() as recorder:
            optimizer.step()
    return recorder.take("embed").peak_bytes
