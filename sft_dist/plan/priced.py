"""What a planned run costs on its machines. Imports no torch."""

from __future__ import annotations

from sft_dist.config.schema import Config
from sft_dist.plan.cost import plan_cost
from sft_dist.plan.machines import Machines
from sft_dist.plan.result import CostPlan, DataPlan, Range


def cost_of(config: Config, machines: Machines, data: DataPlan, total_s: Range) -> CostPlan:
    """``plan_cost`` of a run's machines and data.

    Raises:
        UnknownHardware, ConfigError: as ``plan_cost``.
    """
    return plan_cost(
        machines.gpu,
        hardware=config.hardware,
        num_gpus=machines.num_gpus,
        nodes=machines.nodes,
        gpus_per_node=machines.gpus_per_node,
        total_s=total_s,
        epochs=data.epochs,
        tokens=data.tokens_per_step * data.steps,
    )
