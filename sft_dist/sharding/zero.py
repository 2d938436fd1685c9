"""DeepSpeed ZeRO: stage 1 splits optimizer states, stage 2 gradients too, stage 3 parameters too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sft_dist.data.batch import MicroBatch
from sft_dist.model.build import SftModel
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding.ddp import eval_mode
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.spec import ParameterShard, ShardingSpec
from sft_dist.sharding.strategy import StepResult, Strategy

# DeepSpeed pads a flattened group so that each rank's partition starts at a multiple of this many elements.
PARTITION_ALIGNMENT = 2


def describe(run: Run, rank: int) -> ShardingSpec:
    """Stages 1 and 2: every parameter whole, the optimizer's flat group split. Stage 3: every parameter split flat."""
    world, stage = run.world.size, ZERO_STAGES[run.strategy]
    split = world if stage == 3 else 1
    parameters = tuple(
        ParameterShard(
            p.name,
            -(-p.numel // split),
            run.precision.stored(trainable=p.trainable, strategy=run.strategy),
            p.trainable,
        )
        for p in run.model.parameters
    )
    if stage == 3:
        optimizer_numel = sum(p.local_numel for p in parameters if p.requires_grad)
    else:
        group_sizes = (
            sum(p.numel for p in run.model.trainable if (len(p.shape) >= 2) == matrices) for matrices in (True, False)
        )
        unit = PARTITION_ALIGNMENT * world
        optimizer_numel = sum(-(-size // unit) * PARTITION_ALIGNMENT for size in group_sizes)
    return ShardingSpec(run.strategy, rank, parameters, optimizer_numel, "fp32")


class Zero(Strategy):
    def __init__(self, run: Run, model: SftModel, device: torch.device) -> None:
        deepspeed = _import_deepspeed()
        self.model = model
        self.device = device
        self.world_size = run.world.size
        self.stage = ZERO_STAGES[run.strategy]
        deepspeed.init_distributed(dist_init_required=False)
        optimizer = build_optimizer(run.optim, model.named_parameters(), device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(run), dist_init_required=False
        )

    def forward_backward(self, batch: MicroBatch, *, supervised_in_step: int, is_last_micro_batch: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(is_last_micro_batch)
        loss_sum = self.engine(batch)
        # The engine averages over ranks, as DDP does; dividing by its accumulation steps is left to us.
        self.engine.backward(loss_sum * (self.world_size / supervised_in_step), scale_wrt_gas=False)
        if not is_last_micro_batch:
            self.engine.step()
        result: Tensor = loss_sum.detach()
        return result

    def evaluate(self, batch: MicroBatch) -> Tensor:
        with torch.no_grad(), eval_mode(self.model):
            loss: Tensor = self.engine(batch)
            return loss

    def step(self, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return StepResult(grad_norm=torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64))

    def local_parameters(self) -> Iterator[tuple[str, Tensor, bool]]:
        for name, parameter in self.model.named_parameters():
            local: Tensor = parameter.ds_tensor if self.stage == 3 else parameter  # type: ignore[attr-defined]
            yield name, local, parameter.requires_grad

    def master_weights(self) -> list[Tensor]:
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(self.optimizer, attribute):
                return list(getattr(self.optimizer, attribute))
        raise RuntimeError(f"{type(self.optimizer).__name__} keeps its master weights where we do not know them")

    def full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif not trainable_only:
                with GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.detach()

    def close(self) -> None:
        self.engine.destroy()


def deepspeed_config(run: Run) -> dict[str, Any]:
    """The engine's configuration; every key that changes numbers is set, none is left to a default."""
    bf16 = run.precision.compute == "bf16"
    return {
        "train_micro_batch_size_per_gpu": run.batch.micro_batch_size,
        # The loop counts micro-batches, because the last step of an epoch may have fewer.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": run.precision.reduce,
        "zero_optimization": {
            "stage": ZERO_STAGES[run.strategy],
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed() -> Any:
    """DeepSpeed without its shared-memory collectives, which compile for a minute at the first start; gloo serves."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
