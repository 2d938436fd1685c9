"""Spikes and values that are not finite, met by real runs in worlds of processes: what is trained is what was to be.

The trouble is in the data: a row with a token that no other has, whose loss the model of these tests multiplies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.numpy import load_file
from torch import Tensor

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.store import complete_checkpoints
from sft_dist.config.schema import Config
from sft_dist.data.batch import MicroBatch
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import TrainingDiverged
from sft_dist.model.build import SftModel
from sft_dist.resolve import resolve
from sft_dist.runtime.seeding import seed_step
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World, WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.optim import learning_rate
from sft_dist.sharding.strategy import NativeStrategy
from sft_dist.train import loop, outlook, ready
from sft_dist.train import run as train_run
from sft_dist.train.step import StepOutcome, train_step
from tests.helpers import cells
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]

# Of no other row. Synthetic rows begin at 3.
MARKER = 1
STEPS = 8
EVERY = 3


@dataclass(frozen=True)
class Planted:
    """By which factor the loss of the marked rows is multiplied, and in which steps (1-based) there is one."""

    factor: float = 100.0
    steps: tuple[int, ...] = (5,)


SPIKE, NAN = Planted(), Planted(math.nan)


def marked_data(seed: int, batch: Any, steps: tuple[int, ...]) -> tuple[PreparedData, list[int]]:
    """Rows of which one in each of ``steps`` begins with the marker, and their numbers; rank 1 of two trains them."""
    plain = cells.synthetic_data(rows=60, packing=False)
    order = TrainingOrder(plain, batch, seed)
    marked = [int(order.step(step - 1).sequences[1]) for step in steps]
    rows = [(ids.copy(), mask.copy()) for ids, mask in map(plain.row, range(plain.num_rows))]
    for row in marked:
        rows[row][0][0] = MARKER
    return PreparedData.of(rows), marked


@contextmanager
def marked_losses(factor: float) -> Iterator[None]:
    forward = SftModel.forward

    def planted(self: SftModel, batch: MicroBatch, *, logits: bool = False) -> Tensor:
        result: Tensor = forward(self, batch, logits=logits)
        return result if logits else result * torch.where((batch.input_ids == MARKER).any(), factor, 1.0)

    with patch.object(SftModel, "forward", planted):
        yield


def train(cfg_yaml: str, planted: Planted, *, resume: bool = False, preempt_after: int | None = None) -> str:
    """A run over data with the planted trouble; what it says at its end, where that is an error."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    rank = dist.get_rank()
    world = World(rank, rank, WorldShape(1, dist.get_world_size()))
    run = resolve(cfg, world.shape)
    data, _ = marked_data(run.seed, run.batch, planted.steps)
    inputs = ready.Inputs(data, None, load_renderer(run.model.path, None, None), None)
    seen = outlook.look_ahead(cfg, run, cells.CPU, data, None) if world.is_main else None
    start = complete_checkpoints(Path(run.output_dir) / "checkpoints")[-1] if resume else None
    step = loop.train_step
    with Signals(is_main=world.is_main) as signals, marked_losses(planted.factor):

        def stopped(*args: Any, **kwargs: Any) -> StepOutcome:
            outcome = step(*args, **kwargs)
            if kwargs["lr"] == learning_rate(run.optim, (preempt_after or 0) - 1, STEPS):
                signals.noted = 15
            return outcome

        try:
            with patch.object(loop, "train_step", stopped if preempt_after is not None else step):
                train_run.train(
                    run, cfg, ready.Process(world, cells.CPU, cells.store()), inputs, seen, signals, start=start
                )
        except TrainingDiverged as error:
            return error.what
    return "done"


def without(cfg_yaml: str, planted: Planted, left_out: tuple[int, ...]) -> tuple[list[float], dict[str, Any]]:
    """Losses and weights of the same training over data that lack some steps: no guard, no checkpoint."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    run, strategy = cells.start(cfg)
    data, _ = marked_data(run.seed, run.batch, planted.steps)
    order, losses = TrainingOrder(data, run.batch, run.seed), []
    try:
        with marked_losses(planted.factor):
            for number in range(STEPS):
                if number + 1 not in left_out:
                    seed_step(run.seed, number, dist.get_rank())
                    outcome = train_step(
                        strategy, data, run.batch, order.step(number),
                        rank=dist.get_rank(), device=cells.CPU, lr=learning_rate(run.optim, number, STEPS),
                    )  # fmt: skip
                    losses.append(float(outcome.loss))
        return losses, {n: t.float().numpy().copy() for n, t in strategy.full_parameters(trainable_only=True)}
    finally:
        strategy.close()


def config(base: Path, folder: Path, strategy: str, method: str = "full", **spikes: Any) -> str:
    folder.mkdir(exist_ok=True)
    cfg = cells.config(
        str(base), method, strategy,
        data={"packing": "none"},
        train={"max_steps": STEPS, "micro_batch_size": 1},
        checkpoint={"every_steps": EVERY, "keep_last": 99},
        spikes={"window": 2} | spikes,
    )  # fmt: skip
    return cells.dump(cells.whole_run(cfg, folder))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(folder) if "loss" in line]


def events(folder: Path) -> list[tuple[int, str, str]]:
    return [(line["step"], line["event"], line["because"]) for line in lines(folder) if "event" in line]


def final(folder: Path) -> dict[str, Any]:
    return load_file(folder / "final/model.safetensors")


def same_weights(folder: Path, weights: dict[str, Any]) -> None:
    there = final(folder)
    for name, weight in weights.items():
        np.testing.assert_allclose(there[name.removeprefix("hf.")], weight, rtol=1e-6, atol=1e-7, err_msg=name)


CI = pytest.mark.ci


@pytest.mark.parametrize(
    ("strategy", "planted", "remedy"),
    [
        ("ddp", SPIKE, "skip"),
        ("ddp", SPIKE, "roll_back"),
        ("fsdp2", NAN, "skip"),
        ("zero3", SPIKE, "skip"),
        ("zero1", NAN, "roll_back"),
        *(
            pytest.param(strategy, planted, remedy, marks=CI)
            for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
            for planted in (SPIKE, NAN)
            for remedy in ("skip", "roll_back")
        ),
    ],
)
def test_what_is_left_out_was_never_there(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, planted: Planted, remedy: str
) -> None:
    """Weights, moments and AdamW's count are those of a run over data without the step."""
    spikes = {"policy": remedy, "non_finite": remedy}
    cfg = config(tiny_base, tmp_path / "run", strategy, **spikes)
    assert world(2).run(train, cfg, planted) == ["done", "done"]
    expected, weights = world(2).run(without, cfg, planted, planted.steps)[0]
    trained = losses(tmp_path / "run")
    assert [step for step, _ in trained] == [1, 2, 3, 4, 6, 7, 8]
    np.testing.assert_allclose([loss for _, loss in trained], expected, rtol=1e-6)
    same_weights(tmp_path / "run", weights)
    kind = "spike" if planted is SPIKE else "non_finite"
    back = [(3, "rolled_back", kind), (5, "skipped", "rolled_back")]
    assert events(tmp_path / "run") == (back if remedy == "roll_back" else [(5, "skipped", kind)])
    steps = [Manifest.read(path).position for path in complete_checkpoints(tmp_path / "run/checkpoints")]
    assert [position.updates for position in steps] == ([0] if remedy == "roll_back" else []) + [3, 5, 7]
    about = json.loads((tmp_path / "run/diverged/step-00000005/about.json").read_text())
    assert (about["because"], about["remedy"], about["ranks"]) == (kind, remedy, [1])
