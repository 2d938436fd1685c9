"""``Run``: a resolved run, the one description that trainer and planner read.

Everything here is frozen, holds no tensor and needs neither torch nor a process group. ``resolve`` builds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sft_dist.config.control_schema import EarlyStoppingConfig
from sft_dist.config.data_schema import DataConfig
from sft_dist.config.deepspeed import DeepSpeedKnobs
from sft_dist.config.eval_schema import EvalConfig
from sft_dist.config.schema import (
    ActivationCheckpointingConfig,
    CheckpointConfig,
    ConcreteSharding,
    LoggingConfig,
    OptimConfig,
)
from sft_dist.config.spikes_schema import SpikesConfig
from sft_dist.data.batch import BatchPlan
from sft_dist.model.spec import Dtype, ModelSpec
from sft_dist.runtime.world import WorldShape

StateDtype = Literal["fp32", "bf16", "8bit"]

StrategyName = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]

ZERO_STAGES: dict[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class Precision:
    """The dtype of every kind of tensor.

    Frozen weights are stored in ``compute`` (or packed NF4 in that dtype). Trainable parameters are ``master`` weights
    cast to ``compute`` for each forward pass: DDP and FSDP2 store the master and cast when a module runs or is
    gathered; DeepSpeed stores the cast and keeps the master inside its optimizer. ``optimizer_state`` is how AdamW's
    moments are stored.
    """

    compute: Dtype
    master: Dtype
    reduce: Dtype
    optimizer_state: StateDtype

    def stored(self, *, trainable: bool, strategy: StrategyName) -> Dtype:
        """Dtype of a parameter as the model holds it."""
        return self.master if trainable and strategy not in ZERO_STAGES else self.compute


@dataclass(frozen=True)
class Run:
    """One run on one world.

    ``data``, ``spikes``, ``eval``, ``early_stopping``, ``logging``, ``optim`` and ``activation_checkpointing`` are the
    user's own sections: nothing in them is left to derive. In ``checkpoint``, ``final``, ``keep_best``, ``best_metric``
    and ``best_mode`` are what they come to. ``sharding`` likewise names one strategy and its options; ``deepspeed``
    holds the knobs of a ZeRO strategy, whichever file they come from.
    """

    model: ModelSpec
    world: WorldShape
    sharding: ConcreteSharding
    deepspeed: DeepSpeedKnobs | None
    precision: Precision
    batch: BatchPlan
    optim: OptimConfig
    activation_checkpointing: ActivationCheckpointingConfig
    data: DataConfig
    spikes: SpikesConfig
    eval: EvalConfig
    early_stopping: EarlyStoppingConfig | None
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    num_epochs: int | None
    max_steps: int | None
    seed: int
    neftune_alpha: float | None
    label_smoothing: float
    compile: bool
    output_dir: str

    @property
    def strategy(self) -> StrategyName:
        return self.sharding.strategy

    def num_steps(self, sequences: int) -> int:
        """Optimizer steps of the whole run over ``sequences`` training sequences."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None
        return self.num_epochs * self.batch.steps_per_epoch(sequences)
