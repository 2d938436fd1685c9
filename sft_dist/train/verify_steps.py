"""``sft-dist resume RUN --verify K``: steps that a run has trained, once more from its checkpoint, and compared."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.metrics.logger import METRICS
from sft_dist.metrics.recorded import recorded_steps
from sft_dist.run import Run
from sft_dist.runtime.process_group import process_group
from sft_dist.runtime.seeding import seed_step
from sft_dist.sharding.optim import learning_rate
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.asked import AUTO, Asked
from sft_dist.train.course import Course, build, course_of
from sft_dist.train.position import position_after
from sft_dist.train.ready import Inputs, Process, make_ready
from sft_dist.train.resume import checkpoints_folder
from sft_dist.train.resume_receipt import resume_receipt
from sft_dist.train.starting_point import newest_valid
from sft_dist.train.step import train_step

# The same step under another strategy or on another number of processes.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Replayed:
    """One step, as it was recorded and as it was trained again: (loss, gradient norm)."""

    step: int
    recorded: tuple[float, float]
    now: tuple[float, float]

    @property
    def difference(self) -> float:
        """The larger relative one of both."""
        pairs = zip(self.recorded, self.now, strict=True)
        return max(abs(now - then) / max(abs(then), 1e-30) if now != then else 0.0 for then, now in pairs)


def verify_steps(config: Config, *, steps: int, allowed: Collection[str] = ()) -> None:
    """Trains up to ``steps`` recorded steps again, in memory; writes nothing.

    Args:
        allowed: names of the identity in which the checkpoint may differ.

    Raises:
        SftError: as ``run_training``.
        ConfigError: no step behind a checkpoint is recorded.
        CheckpointError: a step comes out otherwise than it was recorded.
    """
    ready = make_ready(config, resume=AUTO)
    run, process, inputs = ready.run, ready.process, ready.inputs
    recorded = recorded_steps(Path(run.output_dir))
    records = {step: figures for step, figures in recorded.items() if all(map(math.isfinite, figures))}
    with process_group(process.world, process.device, ready.store):
        start = newest_valid(with_steps_behind(ready.checkpoints, records), own=checkpoints_folder(run.output_dir))
        if start is None:
            raise ConfigError(
                f"{run.output_dir}: no step behind any of its checkpoints is recorded in {METRICS}",
                fix="train on for a step or more first; checkpoint.keep_last 2 or more keeps one to start from",
            ).everywhere()
        replayed = _train_again(run, ready.config, process, inputs, start, records, steps, allowed)
        if process.world.is_main:
            _show(replayed)
        worst = max(replayed, key=lambda step: step.difference)
        if not worst.difference <= TOLERANCE:
            raise CheckpointError(
                f"step {worst.step} differs by {worst.difference:.1e} from what was recorded",
                fix="see what changed since (versions, GPUs, data); dropout differs on another number of processes",
            ).everywhere()
        dist.barrier()


def with_steps_behind(checkpoints: list[Path], records: dict[int, tuple[float, float]]) -> list[Path]:
    """Those whose next step is recorded."""
    return [path for path in checkpoints if int(path.name.removeprefix("step-")) + 1 in records]


def _train_again(
    run: Run,
    config: Config,
    process: Process,
    inputs: Inputs,
    start: Path,
    records: dict[int, tuple[float, float]],
    steps: int,
    allowed: Collection[str],
) -> list[Replayed]:
    course = course_of(run, config, process, inputs, Asked(allowed=allowed), start=start)
    built, completed = build(course), course.completed
    built.checkpointer.close()
    assert built.manifest is not None, "there is a start"
    if process.world.is_main:
        _say(course, start, built.manifest)
    try:
        last = next(n for n in range(completed + 1, completed + steps + 2) if n not in records or n > completed + steps)
        return [
            Replayed(number + 1, records[number + 1], _one_step(course, built.strategy, number))
            for number in range(completed, last - 1)
        ]
    finally:
        built.strategy.close()


def _one_step(course: Course, strategy: Strategy, number: int) -> tuple[float, float]:
    """(loss, gradient norm)."""
    run, rank = course.run, course.process.world.rank
    seed_step(run.seed, number, rank)
    outcome = train_step(
        strategy, course.inputs.train_data, run.batch, course.order.step(number),
        rank=rank, device=course.process.device, lr=learning_rate(run.optim, number, course.num_steps),
    )  # fmt: skip
    return float(outcome.loss), float(outcome.grad_norm)


def _say(course: Course, start: Path, manifest: Manifest) -> None:
    console = Console(highlight=False)
    now = position_after(course.run, course.order, manifest.completed_steps, num_steps=course.num_steps)
    for line in resume_receipt(start, manifest, course.run, now, num_steps=course.num_steps):
        console.print(line, soft_wrap=True, markup=False)


def _show(replayed: list[Replayed]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("step", "loss then", "loss now", "norm then", "norm now", "difference"):
        table.add_column(title, justify="right")
    for step in replayed:
        difference = step.difference
        table.add_row(
            f"{step.step:,}",
            *(f"{value:.7g}" for pair in zip(step.recorded, step.now, strict=True) for value in pair),
            "none" if difference == 0 else f"{difference:.1e}",
            style=None if difference <= TOLERANCE and not math.isnan(difference) else "red",
        )
    console = Console(highlight=False)
    console.print(table)
    same = sum(step.difference == 0 for step in replayed)
    console.print(f"{len(replayed)} steps replayed: {same} to the bit")
