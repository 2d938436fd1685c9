"""What is to be submitted, a run or the points of a sweep, and what its plan says that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.cluster.resources import Resources, planned_run, resources_of
from sft_dist.cluster.sweep import Sweep
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.plan.result import Plan

if TYPE_CHECKING:
    from sft_dist.plan.assumed import AssumedData

# Keys that no plan reads; points that differ in these alone are planned once.
NOT_PLANNED: dict[str, Any] = {
    "output_dir": True,
    "logging": True,
    "checkpoint": {"mirror"},
    "optim": {"lr", "weight_decay", "schedule", "warmup_ratio", "max_grad_norm", "lora_plus_ratio", "beta1", "beta2",
              "eps"},
}  # fmt: skip

# Of these a job asks for the most that any point needs.
AMOUNTS = ("cpus_per_task", "memory_gib", "time_limit_s", "signal_before_s")


@dataclass(frozen=True)
class Wanted:
    """What is to be submitted, and what that takes.

    Args:
        config: of the run; of a sweep that of the point whose training takes longest.
        run: ``output_dir``, absolute; of a sweep the folder of its points.
        plan: of ``config``; None where no GPU is known.
        sweep: None: a single run.
        max_parallel: points that train at once; None: as many as SLURM has room for.
        prepares: whether a job before the training fetches the model and prepares the data.
    """

    config: Config
    run: Path
    plan: Plan | None
    resources: Resources
    sweep: Sweep | None = None
    max_parallel: int | None = None
    prepares: bool = True

    @property
    def fits(self) -> bool:
        return self.plan is None or self.plan.memory.verdict != "does not fit"

    @property
    def points(self) -> list[str]:
        """Names of the sweep's points, in the order of the array's indices; none of a single run."""
        return [] if self.sweep is None else [point.name for point in self.sweep.points]

    @property
    def configs(self) -> list[Config]:
        """Of each run."""
        return [self.config] if self.sweep is None else [point.config for point in self.sweep.points]

    @property
    def array(self) -> str | None:
        """Indices of the array, as sbatch takes them; None of a single run."""
        if self.sweep is None:
            return None
        at_once = "" if self.max_parallel is None else f"%{self.max_parallel}"
        return f"0-{len(self.sweep.points) - 1}{at_once}"


def wanted(config: Config, *, prepares: bool = True, assumed: AssumedData | None = None) -> Wanted:
    """Plans a configuration; writes nothing.

    Args:
        assumed: what the data is like, where its owner says so.

    Raises:
        ConfigError: resources are missing, or SLURM could not write its output into the run directory.
        SftError: as ``resources.planned_run``.
    """
    run = _run_directory(config.output_dir)
    planned = planned_run(config, assumed=assumed)
    plan = None if planned is None else planned.plan
    return Wanted(config, run, plan, resources_of(config, planned), prepares=prepares)


def wanted_sweep(
    sweep: Sweep, *, max_parallel: int | None = None, prepares: bool = True, assumed: AssumedData | None = None
) -> Wanted:
    """The same of all points of a sweep: what any of them needs, for each of them.

    Raises:
        ConfigError, SftError: as ``wanted``, of any point.
    """
    run = _run_directory(str(sweep.folder))
    planned: dict[str, Wanted] = {}
    for point in sweep.points:
        key = point.config.model_dump_json(exclude=NOT_PLANNED)
        if key not in planned:
            planned[key] = wanted(point.config, assumed=assumed)
    one = next((each for each in planned.values() if not each.fits), None)
    one = one or max(planned.values(), key=lambda each: each.resources.time_limit_s)
    resources = most({each.run.name: each.resources for each in planned.values()})
    return Wanted(one.config, run, one.plan, resources, sweep, max_parallel, prepares)


def most(needs: Mapping[str, Resources]) -> Resources:
    """What is enough for each of several runs on the same machines, with the reason of the one that needs most of it.

    Args:
        needs: by the names of the runs.
    """
    first = next(iter(needs.values()))
    values = {field.name: getattr(first, field.name) for field in fields(Resources)}
    reasons = dict(first.reasons)
    for amount in AMOUNTS:
        name = max(needs, key=lambda name: getattr(needs[name], amount))
        values[amount] = getattr(needs[name], amount)
        if len({getattr(each, amount) for each in needs.values()}) > 1:
            reasons[amount] = f"{needs[name].reasons[amount]}: of {name}, which needs most"
    starts = [each.starts for each in needs.values() if each.starts is not None]
    return Resources(**(values | {"reasons": reasons, "starts": max(starts, default=None)}))


def _run_directory(output_dir: str) -> Path:
    run = Path(output_dir).resolve()
    if "\n" in str(run) or "\\" in str(run):
        raise ConfigError(
            f"output_dir: {str(run)!r} has a backslash or a line break, which sbatch cannot take in --output",
            fix="set another output_dir",
        )
    return run
