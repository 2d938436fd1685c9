"""``train`` of ``train/run.py`` in a world of processes: its seeds, its checks, and that it adds nothing to the steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.numpy import load_file
from torch.distributed.fsdp import FSDPModule

from sft_dist.checkpoint import checkpointer
from sft_dist.config.eval_schema import EvalConfig
from sft_dist.config.schema import Config
from sft_dist.data.chat_template import load_renderer
from sft_dist.errors import CheckpointError, ShardingMismatch, TrainingDiverged
from sft_dist.resolve import resolve
from sft_dist.runtime.seeding import step_seed
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World, WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.optim import learning_rate
from sft_dist.train import artefact, evaluations, loop, outlook, ready
from sft_dist.train import run as train_run
from sft_dist.train.step import StepOutcome
from tests.helpers import cells
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]


def train(cfg_yaml: str, sample: Any = None) -> None:
    """What ``run_training`` does once the data are prepared, over synthetic ones."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    rank = dist.get_rank()
    world = World(rank, rank, WorldShape(1, dist.get_world_size()))
    run = resolve(cfg, world.shape)
    renderer = load_renderer(run.model.path, None, None)
    held_out = cells.synthetic_data(rows=5, seed=99) if cfg.eval.every_steps is not None else None
    inputs = ready.Inputs(cells.synthetic_data(), held_out, renderer, sample)
    seen = outlook.look_ahead(cfg, run, cells.CPU, inputs.train_data, held_out) if world.is_main else None
    with Signals(is_main=world.is_main) as signals:
        train_run.train(run, cfg, ready.Process(world, cells.CPU, cells.store()), inputs, seen, signals)


def config(base: Path, folder: Path, method: str, strategy: str, **sections: Any) -> Config:
    folder.mkdir(exist_ok=True)
    return cells.whole_run(cells.config(str(base), method, strategy, **sections), folder)


@pytest.mark.parametrize(("strategy", "evaluates"), [("fsdp2", False), ("zero1", True)])
def test_a_run_is_the_steps_and_nothing_else(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, evaluates: bool
) -> None:
    """Two ranks must start from the same adapters; what comes out is what one process makes of the same steps."""
    # Without decay the first step leaves half of the adapters as they are: their gradient is zero while B is.
    optim = {"weight_decay": 0.0}
    cfg = config(tiny_base, tmp_path / "run", "lora", strategy, optim=optim)
    if evaluates:
        cfg = cfg.model_copy(update={"eval": EvalConfig(every_steps=4, before_training=False)})
    world(2).run(train, cells.dump(cfg))
    reference = world(1).run(cells.train, cells.dump(cells.config(str(tiny_base), "lora", optim=optim)))[0]
    every_line = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in every_line if "loss" in line]
    assert [line["step"] for line in every_line if "eval_loss" in line] == ([4, 6] if evaluates else [])
    assert [line["step"] for line in lines] == list(range(1, 7)), "the last step too, with no evaluation after it"
    np.testing.assert_allclose([line["loss"] for line in lines], reference.losses, rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], reference.grad_norms, rtol=1e-5)
    assert [line["lr"] for line in lines] == [learning_rate(cfg.optim, number, 6) for number in range(6)]
    final = load_file(tmp_path / "run/final/adapter_model.safetensors")
    assert len(final) == len(reference.weights)
    for name, weight in reference.weights.items():
        saved = final[name.removeprefix("hf.").replace(".default", "")]
        np.testing.assert_allclose(saved, weight, rtol=1e-3, atol=1e-5, err_msg=name)


def without_a_plan(cfg_yaml: str) -> None:
    with patch.object(outlook, "expect", side_effect=RuntimeError("a library has changed")):
        train(cfg_yaml)


def test_a_run_needs_no_plan(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """Nor a price, here of a file that is not there, nor a receipt, whose place is taken."""
    nowhere = {"price_per_hour_jpy": 300.0, "prices": str(tmp_path / "nowhere.yaml")}
    cfg = config(tiny_base, tmp_path / "run", "lora", "ddp", train={"max_steps": 2}, hardware=nowhere)
    world(1).run(without_a_plan, cells.dump(cfg))
    assert (tmp_path / "run/final").exists()
    receipt = json.loads((tmp_path / "run/receipt.json").read_text())
    _, plan, bill = receipt["not_planned"]
    assert plan == "no plan to compare with: RuntimeError: a library has changed"
    assert "nowhere.yaml" in bill
    assert (receipt["planned"], receipt["ratio"], receipt["actual"]["cost_usd"]) == (None, None, None)
    assert receipt["actual"]["steps"] == 2
    (tmp_path / "taken/receipt.json").mkdir(parents=True)
    world(1).run(train, cells.dump(config(tiny_base, tmp_path / "taken", "lora", "ddp", train={"max_steps": 1})))
    assert (tmp_path / "taken/final").exists()


def message_of_broken_run(cfg_yaml: str, breakage: str) -> str:
    """What a run says in which one thing is wrong on rank 1 alone: what it should hold, or its learning rate."""
    rank = dist.get_rank()
    describe = registry.describe
    step = loop.train_step

    def left_gathered(*args: Any, **kwargs: Any) -> StepOutcome:
        outcome = step(*args, **kwargs)
        for module in args[0].model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        return outcome

    if breakage == "left gathered":
        shards = patch.multiple(loop, train_step=left_gathered, MovementCheck=Mock())
    elif breakage == "other description":
        shards = patch.object(registry, "describe", lambda run, _: replace(describe(run, 0), rank=rank))
    else:
        shards = patch.object(loop, "learning_rate", lambda *_: 0.0 if rank == 1 else 1e-3)
    with shards, pytest.raises(ShardingMismatch) as caught:
        train(cfg_yaml)
    return caught.value.what


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("other description", "fsdp2 did not shard as described: rank 1: hf.model.embed_tokens.weight"),
        ("left gathered", "fsdp2 did not shard as described: rank 0: hf.model.embed_tokens.weight"),
        ("no movement", "no parameter moved in the first optimizer step on rank 1"),
    ],
)
def test_a_run_checks_itself_on_every_rank(
    world: Worlds, tiny_base: Path, tmp_path: Path, breakage: str, message: str
) -> None:
    cfg = config(tiny_base, tmp_path / "run", "full", "fsdp2")
    said = world(2).run(message_of_broken_run, cells.dump(cfg), breakage)
    assert len(set(said)) == 1
    assert message in said[0]
    assert not (tmp_path / "run/final").exists()


def message_of_divergence(cfg_yaml: str) -> str:
    """What a run says whose only step has a finite loss and an infinite gradient."""
    outcome = StepOutcome(
        loss=torch.tensor(1.5), grad_norm=torch.tensor(torch.inf), data_wait_s=0.0, loss_sums=(torch.tensor(1.5),) * 2
    )
    steps = patch.object(loop, "train_step", lambda *_, **__: outcome)
    with steps, patch.object(loop.MovementCheck, "verify"), pytest.raises(TrainingDiverged) as caught:
        train(cfg_yaml)
    return caught.value.what


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_infinite_gradient_is_a_divergence(world: Worlds, tiny_base: Path, tmp_path: Path, method: str) -> None:
    """Also in the last step, after which no loss would show it."""
    cfg = config(tiny_base, tmp_path / "run", method, "ddp", train={"max_steps": 1})
    assert set(world(2).run(message_of_divergence, cells.dump(cfg))) == {
        "step 1: loss 1.5, gradient norm inf, every loss is finite, the gradient is not; "
        f"its batch is in {tmp_path}/run/diverged/step-00000001/"
    }
    step, event = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert step["non_finite"] == ["grad_norm"]
    assert (event["event"], event["step"], event["non_finite"]) == ("non_finite", 1, ["of_grad_norm"])
    assert not (tmp_path / "run/final").exists()
    assert not (tmp_path / "run/checkpoints").exists(), "a state that diverged is not worth keeping"


def seeds(cfg_yaml: str) -> list[int]:
    """What torch's generators were set to in every step of a run."""
    seen, step = [], loop.train_step

    def watched(*args: Any, **kwargs: Any) -> StepOutcome:
        seen.append(torch.initial_seed())
        return step(*args, **kwargs)

    with patch.object(loop, "train_step", watched):
        train(cfg_yaml)
    return seen


def test_every_rank_draws_its_own_in_every_step(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    drawn = world(2).run(seeds, cells.dump(config(tiny_base, tmp_path / "run", "lora", "ddp")))
    assert drawn == [[step_seed(3, step, rank) for step in range(6)] for rank in range(2)]


def interrupted_evaluation(cfg_yaml: str) -> list[str]:
    """The checkpoints that are there when an evaluation has failed while one was being written, slowly."""
    write = checkpointer.write_shard

    def slow(*args: Any) -> Any:
        time.sleep(1)
        return write(*args)

    with (
        patch.object(checkpointer, "write_shard", slow),
        patch.object(evaluations, "evaluate", side_effect=RuntimeError),
        pytest.raises(RuntimeError),
    ):
        train(cfg_yaml)
    return [path.name for path in (Path(yaml.safe_load(cfg_yaml)["output_dir"]) / "checkpoints").iterdir()]


def test_no_checkpoint_is_ahead_of_its_evaluation(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint does not evaluate it."""
    cfg = config(tiny_base, tmp_path / "run", "full", "ddp", checkpoint={"every_steps": 1})
    cfg = cfg.model_copy(update={"eval": EvalConfig(every_steps=2, before_training=False)})
    assert world(1).run(interrupted_evaluation, cells.dump(cfg)) == [["step-00000001"]]


def refused_artefact(cfg_yaml: str) -> str:
    """What a run says whose artefact fails its proof."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    cfg = cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"prove_final": True})})

    def refuse(folder: Path, *_: object) -> None:
        assert (folder / "adapter_model.safetensors").exists()
        raise CheckpointError(f"{folder.name} is not it", fix="none")

    with patch.object(artefact, "prove_artefact", refuse), pytest.raises(CheckpointError) as caught:
        train(cells.dump(cfg), sample=object())
    return caught.value.what


def test_final_has_its_name_only_when_it_is_proven(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    text = cells.dump(config(tiny_base, tmp_path / "run", "lora", "fsdp2"))
    assert world(2).run(refused_artefact, text) == ["final.unfinished is not it"] * 2
    assert not (tmp_path / "run/final").exists()
    assert (tmp_path / "run/final.unfinished").exists()
    assert (tmp_path / "run/checkpoints/step-00000006").exists()
