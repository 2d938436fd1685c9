"""Spikes and values that are not finite, met by real runs in worlds of processes: what is trained is what was to be.

The trouble is in the data: a row with a token that no other has, whose loss the model of these tests multiplies.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
from sft_dist.errors import Preempted, TrainingDiverged
from sft_dist.model.build import SftModel
from sft_dist.resolve import resolve
from sft_dist.runtime.seeding import seed_step
from sft_dist.runtime.world import World, WorldShape
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

    def planted(self: SftModel, batch: MicroBatch, *, logits: bool = False, **more: Any) -> Tensor:
        result: Tensor = forward(self, batch, logits=logits, **more)
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
    # Real ones would not listen again in this process.
    signals: Any = SimpleNamespace(noted=0, while_training=nullcontext)

    def stopped(*args: Any, **kwargs: Any) -> StepOutcome:
        if kwargs["lr"] == learning_rate(run.optim, (preempt_after or 0) - 1, STEPS):
            signals.noted = signal.SIGTERM
        return step(*args, **kwargs)

    try:
        with (
            marked_losses(planted.factor),
            patch.object(loop, "train_step", stopped if preempt_after is not None else step),
        ):
            train_run.train(
                run, cfg, ready.Process(world, cells.CPU, cells.store()), inputs, seen, signals, start=start
            )
    except (TrainingDiverged, Preempted) as error:
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


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero1", marks=CI), pytest.param("zero3", marks=CI)])
def test_waiting_for_the_loss_changes_nothing(world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    """Without trouble a run that may skip or go back is the run that may not, bit for bit."""
    found = []
    for policy in ("off", "skip", "roll_back"):
        cfg = config(tiny_base, tmp_path / policy, strategy, policy=policy)
        assert world(2).run(train, cfg, Planted(1.0)) == ["done"] * 2
        assert events(tmp_path / policy) == []
        found.append([(line["loss"], line["grad_norm"]) for line in lines(tmp_path / policy)])
    assert found[0] == found[1] == found[2]


def test_a_spike_is_told_and_trained(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    cfg = config(tiny_base, tmp_path / "run", "ddp")
    assert world(2).run(train, cfg, SPIKE) == ["done", "done"]
    (event,) = (line for line in lines(tmp_path / "run") if "event" in line)
    assert (event["step"], event["event"], event["ranks"]) == (5, "spike", [1])
    assert event["of_loss"] == dict(losses(tmp_path / "run"))[5] > 4 * event["median_loss"]
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    _, weights = world(2).run(without, cfg, SPIKE, ())[0]
    same_weights(tmp_path / "run", weights)


@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        ("fsdp2", "roll_back"),
        pytest.param("zero3", "skip", marks=CI),
        *(pytest.param("ddp", remedy, marks=CI) for remedy in ("skip", "roll_back")),
        pytest.param("zero1", "roll_back", marks=CI),
    ],
)
@pytest.mark.parametrize("stopped_after", [7, pytest.param(4, marks=CI), pytest.param(5, marks=CI)])
def test_a_resumed_run_is_the_uninterrupted_one(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, remedy: str, stopped_after: int
) -> None:
    """Bit for bit: what was left out, AdamW's count and the losses by which the next spike is told go on, too.

    Stopped before, in and after the step; the second trouble comes when the run has been resumed.
    """
    planted = Planted(steps=(5, 8))
    runs = {name: config(tiny_base, tmp_path / name, strategy, policy=remedy) for name in ("whole", "parts")}
    assert world(2).run(train, runs["whole"], planted) == ["done"] * 2
    for said in world(2).run(preempted, runs["parts"], planted, stopped_after):
        # Back at step 3, it stops at the end of the next one.
        end = 4 if (remedy, stopped_after) == ("roll_back", 5) else stopped_after
        assert said.startswith(f"preempted by SIGTERM at step {end}")
    assert world(2).run(resumed, runs["parts"], planted) == ["done"] * 2
    whole, parts = (list(lines(tmp_path / name)) for name in runs)
    same = ("step", "loss", "grad_norm", "lr")
    numbers = [[tuple(line[key] for key in same) for line in each if "loss" in line] for each in (whole, parts)]
    assert numbers[0] == numbers[1]
    assert [step for step, *_ in numbers[0]] == [1, 2, 3, 4, 6, 7]
    weights = final(tmp_path / "whole")
    for name, weight in final(tmp_path / "parts").items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)
    newest = [Manifest.read(complete_checkpoints(tmp_path / name / "checkpoints")[-1]).position for name in runs]
    assert newest[0].skipped_steps == newest[1].skipped_steps == (5, 8)
    assert newest[0].recent_losses == newest[1].recent_losses
    assert newest[0].updates == 6


def preempted(cfg_yaml: str, planted: Planted, stopped_after: int) -> str:
    return train(cfg_yaml, planted, preempt_after=stopped_after)


def resumed(cfg_yaml: str, planted: Planted) -> str:
    return train(cfg_yaml, planted, resume=True)


@pytest.mark.parametrize("strategy", ["zero3", *(pytest.param(name, marks=CI) for name in ("ddp", "fsdp2", "zero1"))])
@pytest.mark.parametrize("remedy", ["skip", pytest.param("roll_back", marks=CI)])
def test_more_than_is_allowed_ends_the_run(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, remedy: str
) -> None:
    planted = Planted(math.nan, steps=(4, 5, 6))
    cfg = config(tiny_base, tmp_path / "run", strategy, non_finite=remedy, max_in_a_row=2)
    (said,) = set(world(2).run(train, cfg, planted))
    assert said.startswith("step 6: loss nan")
    assert "the 2 steps before it were left out, too (spikes.max_in_a_row)" in said
    newest = Manifest.read(complete_checkpoints(tmp_path / "run/checkpoints")[-1])
    assert newest.completed_steps == 3
    assert sorted(path.name for path in (tmp_path / "run/diverged").iterdir()) == [
        f"step-0000000{n}" for n in (4, 5, 6)
    ]
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize("first", [(1,), pytest.param((1, 2), marks=CI)])
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero1", marks=CI), pytest.param("fsdp2", marks=CI)])
def test_the_first_step_may_be_the_one(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, first: tuple[int, ...]
) -> None:
    """It moves nothing then, and the next one has to."""
    planted = Planted(math.nan, steps=first)
    for remedy in ("skip", "roll_back"):
        cfg = config(tiny_base, tmp_path / remedy, strategy, non_finite=remedy)
        assert world(2).run(train, cfg, planted) == ["done", "done"]
        expected, weights = world(2).run(without, cfg, planted, first)[0]
        np.testing.assert_allclose([loss for _, loss in losses(tmp_path / remedy)], expected, rtol=1e-6)
        same_weights(tmp_path / remedy, weights)
    cfg = config(tiny_base, tmp_path / "stop", strategy)
    (said,) = set(world(2).run(train, cfg, planted))
    assert said.startswith("step 1: loss nan")


def with_an_infinite_gradient(cfg_yaml: str) -> str:
    """In the fifth step, of one parameter on one rank; every loss is finite."""
    calls = {"steps": 0}
    step = NativeStrategy.step

    def planted(self: NativeStrategy, lr: float, *, only_finite: bool = False) -> Any:
        calls["steps"] += 1
        if calls["steps"] == 5:
            for name, parameter in self.model.named_parameters():
                if name.endswith("layers.1.self_attn.k_proj.weight") and (dist.get_rank() == 1 or cfg_is_ddp):
                    assert parameter.grad is not None
                    grad = parameter.grad
                    (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = math.inf
        return step(self, lr, only_finite=only_finite)

    cfg_is_ddp = yaml.safe_load(cfg_yaml)["sharding"]["strategy"] == "ddp"
    with patch.object(NativeStrategy, "step", planted):
        return train(cfg_yaml, Planted(1.0))


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=CI)])
def test_a_gradient_that_is_not_finite_is_named(world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    cfg = config(tiny_base, tmp_path / "stop", strategy)
    (said,) = set(world(2).run(with_an_infinite_gradient, cfg))
    parameter = "hf.model.layers.1.self_attn.k_proj.weight"
    assert f"gradient norm inf, every loss is finite, the gradient is not, {parameter} first" in said
    about = json.loads((tmp_path / "stop/diverged/step-00000005/about.json").read_text())
    assert about["non_finite_gradients"] == [parameter]
    assert about["ranks"] == []
    assert all(isinstance(each["loss"], float) for each in about["micro_batches"])
    for remedy in ("skip", "roll_back"):
        cfg = config(tiny_base, tmp_path / remedy, strategy, non_finite=remedy)
        assert world(2).run(with_an_infinite_gradient, cfg) == ["done", "done"]
        _, weights = world(2).run(without, cfg, Planted(1.0), (5,))[0]
        same_weights(tmp_path / remedy, weights)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.ci
@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize("knobs", [{}, OFFLOAD], ids=["on the device", "offloaded"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_drops_a_step_wherever_it_keeps_gradients(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, knobs: dict[str, Any], compute: str
) -> None:
    """In several micro-batches; also by its other optimizer, of stage 1 in bf16."""
    (tmp_path / "run").mkdir()
    cfg = cells.config(
        str(tiny_base), "full", strategy,
        data={"packing": "none"},
        sharding={"strategy": strategy, "deepspeed_config": knobs},
        precision={"compute": compute},
        train={"max_steps": STEPS, "micro_batch_size": 1},
        spikes={"window": 2, "policy": "skip", "non_finite": "skip"},
    )  # fmt: skip
    text = cells.dump(cells.whole_run(cfg, tmp_path / "run"))
    for planted in (SPIKE, NAN):
        assert world(2).run(train, text, planted) == ["done", "done"]
        expected, _ = world(2).run(without, text, planted, planted.steps)[0]
        np.testing.assert_array_equal([loss for _, loss in losses(tmp_path / "run")], expected)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
