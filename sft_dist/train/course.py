"""What a run has to train, how much of it is behind, and the model at that point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import Identity, Manifest, Position
from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.run import Run
from sft_dist.sharding import registry
from sft_dist.sharding.spec import ShardingSpec
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.asked import Asked
from sft_dist.train.early_stopping import has_fired
from sft_dist.train.loading import loading
from sft_dist.train.ready import Inputs, Process
from sft_dist.train.receipt import identity_values
from sft_dist.train.resume import check_position, checkpoints_folder


@dataclass(frozen=True)
class Course:
    """The way of a run from where it is to its last step.

    Args:
        config: that the run was resolved from.
        who: what the run is (``receipt.identity_values``).
        start: the checkpoint to go on from; None where the run begins.
        completed: steps behind.
    """

    run: Run
    config: Config
    process: Process
    inputs: Inputs
    order: TrainingOrder
    num_steps: int
    identity: Identity
    who: Mapping[str, Any]
    start: Path | None
    completed: int

    @property
    def final(self) -> Path:
        return Path(self.run.output_dir) / "final"

    @property
    def is_finished(self) -> bool:
        return self.final.exists() and (self.completed == self.num_steps or self._has_stopped)

    @property
    def _has_stopped(self) -> bool:
        """Whether it ended before its last step, because its evaluations got no better."""
        if self.start is None:
            return False
        return has_fired(self.run.early_stopping, Manifest.read(self.start).position.waiting)


def course_of(
    run: Run, config: Config, process: Process, inputs: Inputs, asked: Asked, *, start: Path | None
) -> Course:
    """
    Raises:
        ConfigError: the checkpoint belongs to another run, or the run would end before it.
        CheckpointError: the checkpoint is damaged, or the order of the data is another one.
        Exception: what ``asked.on_identity`` raises.
    """
    order = TrainingOrder(inputs.train_data, run.batch, run.seed)
    num_steps = run.num_steps(inputs.train_data.num_sequences)
    identity = identity_of(run, inputs.train_data)
    who = identity_values(identity, str(inputs.renderer.tokenizer.chat_template))
    asked.on_identity(who)
    completed = 0
    if start is not None:
        completed = check_position(start, identity, order, num_steps=num_steps, allowed=asked.allowed)
    return Course(run, config, process, inputs, order, num_steps, identity, who, start, completed)


@dataclass(frozen=True)
class Built:
    """The model as it is sharded, at the position from which training goes on.

    Args:
        spec: what this rank holds between steps.
        manifest: of the checkpoint that was loaded; None where the run begins.
    """

    strategy: Strategy
    spec: ShardingSpec
    checkpointer: Checkpointer
    manifest: Manifest | None

    @property
    def position(self) -> Position:
        return Position(completed_steps=0) if self.manifest is None else self.manifest.position


def build(course: Course) -> Built:
    """Build -> shard -> verify -> resume; every rank calls it.

    Raises:
        CheckpointError: weights or checkpoint are missing, damaged or of another model.
        ShardingMismatch: a rank holds something else than described.
    """
    run, process = course.run, course.process
    with loading(process.world, on_read=process.limits.read) as on_bytes:
        strategy = registry.apply(run, process.device, on_bytes=on_bytes)
    spec = registry.describe(run, process.world.rank)
    verify_sharding(strategy, spec)
    checkpointer = Checkpointer(
        checkpoints_folder(run.output_dir),
        rules=run.checkpoint,
        identity=course.identity,
        strategy_name=run.strategy,
        settings=dump_config(course.config),
        on_file=process.limits.saved,
    )
    manifest = None if course.start is None else checkpointer.load(course.start, strategy)
    return Built(strategy, spec, checkpointer, manifest)
