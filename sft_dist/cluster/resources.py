"""What a job asks SLURM for: from the configuration where it says so, else from the plan, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from sft_dist.cluster.time_limit import HOUR_S, MINUTE_S, limit_of_seconds, rounded_up, seconds_of_limit
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, UnknownHardware
from sft_dist.runtime.quiet import quiet_libraries

if TYPE_CHECKING:
    from sft_dist.plan.assumed import AssumedData
    from sft_dist.plan.dry_run import DryRun

# Of the planned host memory, and at most so much a process. What the plan does not count: the launcher, W&B's process,
# NCCL's shared memory, allocators' slack. The page cache is not in it either: a job's limit counts it, but the kernel
# takes it back before it ends a job.
MEMORY_MARGIN = 0.2
MOST_MARGIN_GIB = 8
# What a process of training keeps busy, one core each: its main thread, autograd's thread for the backward pass, NCCL's
# or gloo's proxy, and what writes checkpoints and metrics beside it (W&B's process too).
CPUS_OF_A_PROCESS = 4
# An optimizer that steps in host memory is limited by the memory's rate, which a few cores reach.
CPUS_OF_A_HOST_OPTIMIZER = 4
# slurm.conf(5) and sbatch(1): the signal may come up to 60 s before its time.
EARLINESS_S = 60
LEAST_SIGNAL_S = 120
SIGNAL_WITHOUT_PLAN_S = 300
# Before each start: what checks the nodes takes less than this.
DOCTOR_S = 20
# Of an evaluation of data that cannot be counted; it is finished first.
UNKNOWN_EVALUATION_S = 300
# A process notices the signal at the end of a step, all agree at the next one, and one more may be a slow one.
STEPS_TO_STOP = 3
# Disks are assumed; half or twice of it is what the plan expects of them.
SLOWER_DISK = 2
MOST_SIGNAL_S = 65_535  # sbatch takes no more


@dataclass(frozen=True)
class Resources:
    """What the training job asks for.

    Args:
        gpus_per_node: processes of a node, one for each GPU; without GPUs (``request_gpus: none``) just that.
        tasks_per_node: that srun starts: launchers, or with ``launcher: srun`` the processes themselves.
        cpus_per_task: of such a task.
        memory_gib: of a node.
        time_limit_s: of one start of the job.
        signal_before_s: before that, when the processes are told to save and stop.
        unit: what those are called.
        starts: how many it takes until the run is done, if none is interrupted; None: not planned.
        reasons: one line for each field above, by its name.
    """

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    memory_gib: int
    time_limit_s: int
    signal_before_s: int
    starts: int | None
    reasons: dict[str, str]
    unit: Literal["GPUs", "processes"] = "GPUs"

    @property
    def cpus_per_node(self) -> int:
        return self.tasks_per_node * self.cpus_per_task

    def __post_init__(self) -> None:
        assert set(self.reasons) == {field.name for field in fields(self)} - {"reasons", "unit"}


def planned_run(config: Config, *, assumed: AssumedData | None = None) -> DryRun | None:
    """The plan that a job's resources are taken from; None where no GPU is known and the configuration says it all.

    Args:
        assumed: in place of the data.

    Raises:
        ConfigError: no GPU is known, and ``cluster`` does not say what would come from the plan.
        SftError: as ``plan.dry_run.dry_run``.
    """
    if config.hardware.gpu is None and config.cluster.request_gpus == "none":
        _check_all_stated(config, "hardware.gpu is not set, and cluster.request_gpus is none")
        return None
    quiet_libraries()
    from sft_dist.plan.dry_run import dry_run
    from sft_dist.plan.machines import machines_of

    try:
        machines = machines_of(config.hardware)
    except UnknownHardware as unknown:
        if config.hardware.gpu is not None:
            raise
        _check_all_stated(config, unknown.what)
        return None
    return dry_run(config, machines, assumed=assumed)


def _check_all_stated(config: Config, why: str) -> None:
    """
    Raises:
        ConfigError: something would come from the plan.
    """
    stated = {"time_limit": config.cluster.time_limit, "memory_gib": config.cluster.memory_gib}
    missing = " and ".join(f"cluster.{key}" for key, value in stated.items() if value is None)
    if missing:
        raise ConfigError(
            f"{why}: nothing is planned, and {missing} would come from the plan",
            fix=f"set {missing}, or hardware.gpu to the GPU of the nodes, e.g. h100",
        )


def resources_of(config: Config, planned: DryRun | None) -> Resources:
    """
    Args:
        planned: as ``planned_run`` found it.

    Raises:
        ConfigError: the time limit leaves no time to train in.
    """
    gpus, nodes = config.hardware.gpus_per_node or 1, config.hardware.nodes or 1
    per_process, cpus_reason = _cpus(config, planned)
    alone = config.cluster.launcher == "srun"
    memory, memory_reason = _memory(config, planned)
    signal_s, signal_reason = _signal(config, planned)
    limit_s, limit_reason, starts = _time_limit(config, planned, signal_s)
    return Resources(
        nodes=nodes,
        gpus_per_node=gpus,
        tasks_per_node=gpus if alone else 1,
        cpus_per_task=per_process if alone else per_process * gpus,
        memory_gib=memory,
        time_limit_s=limit_s,
        signal_before_s=signal_s,
        starts=starts,
        unit="processes" if config.cluster.request_gpus == "none" else "GPUs",
        reasons={
            "nodes": _stated("hardware.nodes", config.hardware.nodes),
            "gpus_per_node": _stated("hardware.gpus_per_node", config.hardware.gpus_per_node),
            "tasks_per_node": f"cluster.launcher {config.cluster.launcher}: "
            + ("one task a process" if alone else "one task a node, which starts its processes"),
            "cpus_per_task": cpus_reason if alone or gpus == 1 else f"{gpus} x {per_process}: {cpus_reason}",
            "memory_gib": memory_reason,
            "time_limit_s": limit_reason,
            "signal_before_s": signal_reason,
            "starts": "" if starts is None else "until the run is done, if none of them is interrupted",
        },
    )


def _stated(key: str, value: int | None) -> str:
    return key if value is not None else f"{key} is not set"


def _cpus(config: Config, planned: DryRun | None) -> tuple[int, str]:
    """Of a process."""
    if config.cluster.cpus_per_gpu is not None:
        return config.cluster.cpus_per_gpu, "cluster.cpus_per_gpu"
    reason = "main thread, backward pass, communication, checkpoints and metrics"
    if planned is None or not {"offloaded states", "paged states"} & set(planned.plan.memory.host_parts):
        return CPUS_OF_A_PROCESS, reason
    return CPUS_OF_A_PROCESS + CPUS_OF_A_HOST_OPTIMIZER, f"{reason}; {CPUS_OF_A_HOST_OPTIMIZER} for states on the host"


def _memory(config: Config, planned: DryRun | None) -> tuple[int, str]:
    """GiB of a node."""
    if config.cluster.memory_gib is not None:
        return math.ceil(config.cluster.memory_gib), "cluster.memory_gib"
    assert planned is not None, "planned_run asks for memory_gib"
    parts = planned.plan.memory.host_parts
    needed_gib = sum(parts.values()) / 2**30
    margin_gib = min(MEMORY_MARGIN * needed_gib, MOST_MARGIN_GIB * planned.run.world.ranks_per_node)
    largest = max(parts, key=lambda name: parts[name])
    return (
        math.ceil(needed_gib + margin_gib),
        f"planned {needed_gib:,.1f} GiB and {margin_gib:,.1f} more; most is {largest}, {parts[largest] / 2**30:,.1f}",
    )


def _signal(config: Config, planned: DryRun | None) -> tuple[int, str]:
    """Seconds before the time limit, to whole minutes."""
    if config.cluster.signal_before_s is not None:
        return config.cluster.signal_before_s, "cluster.signal_before_s"
    if planned is None:
        return SIGNAL_WITHOUT_PLAN_S, "no plan says how long saving takes: 5 minutes"
    from sft_dist.plan.answers import planned_answers
    from sft_dist.plan.disk import saved_state_bytes
    from sft_dist.plan.fit import evaluates
    from sft_dist.plan.rates import DISK_BYTES_PER_S
    from sft_dist.plan.units import duration

    time, data = planned.plan.time, planned.plan.data
    parts = {
        f"{STEPS_TO_STOP} steps": STEPS_TO_STOP * time.step.high,
        "a save": SLOWER_DISK * saved_state_bytes(planned.run) / DISK_BYTES_PER_S,
    }
    is_here = data.basis != "assumed" and (data.basis != "estimated" or data.evaluations)
    if evaluates(planned.run) and not is_here:
        parts["an evaluation (data.eval is not here)"] = UNKNOWN_EVALUATION_S
    elif data.evaluations:
        parts["an evaluation"] = SLOWER_DISK * time.phases["eval"] / data.evaluations
        answers = planned_answers(planned.run, data)
        if answers is not None and answers.evaluations:
            parts["its answers"] = time.phases["answers"] / answers.evaluations
    needed = EARLINESS_S + sum(parts.values())
    said = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    seconds = max(LEAST_SIGNAL_S, math.ceil(needed / MINUTE_S) * MINUTE_S)
    if seconds > MOST_SIGNAL_S:
        raise ConfigError(
            f"to save and stop takes {duration(needed)} ({said}), and SLURM signals at most {MOST_SIGNAL_S} s before "
            "the time limit",
            fix="evaluate on fewer rows (data.eval), or set cluster.signal_before_s",
        )
    return seconds, f"{said}, 1 min for the scheduler's clock; at least 2 min"


def _time_limit(config: Config, planned: DryRun | None, signal_s: int) -> tuple[int, str, int | None]:
    """Seconds of one start, why, and how many starts it takes."""
    stated = None if config.cluster.time_limit is None else seconds_of_limit(config.cluster.time_limit)
    if planned is None:
        assert stated is not None, "planned_run asks for time_limit"
        _leave_time(stated, spent_s=signal_s + EARLINESS_S, said=f"{signal_s} s before it to save and stop")
        return stated, "cluster.time_limit; nothing is planned without a GPU", None
    from sft_dist.plan.units import duration, duration_range

    time, margin = planned.plan.time, config.cluster.time_margin
    load_s = time.phases["load"] + DOCTOR_S
    before_s = signal_s + EARLINESS_S
    if stated is None:
        seconds = rounded_up(time.total.value * margin + DOCTOR_S + before_s)
        reason = f"planned {duration_range(time.total)} x {margin:g}, and {before_s} s for the signal"
        return seconds, reason, 1
    said = f"{duration(load_s)} to start and {before_s} s before it to save and stop"
    useful_s = _leave_time(stated, spent_s=load_s + before_s, said=said)
    starts = max(1, math.ceil((time.total.value - time.phases["load"]) / useful_s))
    reason = f"cluster.time_limit; planned are {duration_range(time.total)}"
    return stated, reason if starts == 1 else f"{reason}: {starts} starts, each from the checkpoint of the last", starts


def _leave_time(limit_s: int, *, spent_s: float, said: str) -> float:
    """Seconds that are left to train in, of each start."""
    if limit_s > spent_s:
        return limit_s - spent_s
    raise ConfigError(
        f"cluster.time_limit {limit_of_seconds(limit_s)} leaves no time to train in: {said}",
        fix=f"set cluster.time_limit to {limit_of_seconds(rounded_up(spent_s + HOUR_S))} or more",
    )
