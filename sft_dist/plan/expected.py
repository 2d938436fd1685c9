"""What a run is planned to take, in figures that it measures of itself: the plan's half of ``receipt.json``."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.config.schema import Config
from sft_dist.plan.disk import final_bytes, num_checkpoints, saved_state_bytes
from sft_dist.plan.dry_run import plan_run, time_plan
from sft_dist.plan.fit import phases_of
from sft_dist.plan.machines import Machines
from sft_dist.plan.memory import allocated_range
from sft_dist.plan.result import DataPlan, Plan
from sft_dist.run import Run


@dataclass(frozen=True)
class Expected:
    """Sizes and counts are planned for any device, seconds for a GPU of the table only.

    Args:
        peak_allocated_bytes: of the rank that needs most, in any phase.
        steps, tokens, evaluations, checkpoints: of the whole run.
        checkpoint_bytes: of one.
        final_bytes: without the tokenizer's files.
        step_s: of a full step; None without a known GPU, as all that follow.
        uncalibrated_step_s: the same without what earlier runs measured here.
        total_s: of the run, from its start to ``final/``.
        flops_per_token, peak_flops_per_s: for MFU: model FLOPs, and the peak of one GPU in the compute dtype.
    """

    peak_allocated_bytes: int
    steps: int
    tokens: int
    evaluations: int
    checkpoints: int
    checkpoint_bytes: int
    final_bytes: int
    step_s: float | None = None
    uncalibrated_step_s: float | None = None
    tokens_per_s: float | None = None
    total_s: float | None = None
    flops_per_token: float | None = None
    peak_flops_per_s: float | None = None


def expect(config: Config, run: Run, machines: Machines | None, data: DataPlan) -> tuple[Expected, Plan | None]:
    """Plans a run that is about to start; with the whole plan where its GPU is known.

    Args:
        machines: that it runs on; None: a CPU, or a GPU that is not in the table.
        data: counted.

    Raises:
        SftError: as ``plan_run``.
    """
    sizes = {
        "peak_allocated_bytes": int(allocated_range(phases_of(run)).value),
        "steps": data.steps,
        "tokens": round(data.tokens_per_step * data.steps),
        "evaluations": data.evaluations,
        "checkpoints": num_checkpoints(run, data),
        "checkpoint_bytes": saved_state_bytes(run),
        "final_bytes": final_bytes(run),
    }
    if machines is None:
        return Expected(**sizes), None
    plan = plan_run(config, run, machines, data)
    time = plan.time
    plain = time if time.basis != "calibrated here" else time_plan(run, machines, data, calibration=None)
    return (
        Expected(
            **sizes,
            step_s=time.step.value,
            uncalibrated_step_s=plain.step.value,
            tokens_per_s=time.tokens_per_s.value,
            total_s=time.total.value,
            flops_per_token=time.flops_per_token,
            peak_flops_per_s=machines.gpu.flops[run.precision.compute],
        ),
        plan,
    )
