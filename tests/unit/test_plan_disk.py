"""What a dry run says will be on the disk, against what runs of one process write there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import Position
from sft_dist.checkpoint.store import complete_checkpoints
from sft_dist.config.schema import Config, FullMethod
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.model.export import export
from sft_dist.plan.data import counted_plan
from sft_dist.plan.disk import disk_bytes, final_bytes, num_checkpoints, save_host_bytes, saved_state_bytes
from sft_dist.plan.result import DataPlan, Range
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import World, WorldShape
from sft_dist.train import outlook, ready
from sft_dist.train import run as train_run
from tests.helpers import cells
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]

Written = tuple[int, int]
"""Bytes and number of files."""


def _size(folder: Path, *, but: tuple[str, ...] = ()) -> Written:
    sizes = [path.stat().st_size for path in folder.iterdir() if not path.name.startswith(but or "\0")]
    return sum(sizes), len(sizes)


def saved(cfg_yaml: str, folder: str) -> tuple[Written, Written]:
    """What a checkpoint after one step and ``final/`` without the tokenizer take."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    run, strategy = cells.start_and_step(cfg)
    data, place = cells.synthetic_data(), Path(folder)
    try:
        checkpointer = Checkpointer(
            place, rules=run.checkpoint, identity=identity_of(run, data), strategy_name=run.strategy, settings=cfg_yaml
        )
        upcoming = TrainingOrder(data, run.batch, run.seed).step(1).sequences.tolist()
        checkpointer.save(strategy, Position(completed_steps=1, next_sequences=tuple(upcoming)))
        checkpointer.wait()
        (outcome,) = checkpointer.news()
        assert outcome.error is None
        is_full, is_main = run.model.method.type == "full", dist.get_rank() == 0
        export(
            place / "final", run.model, strategy.model, strategy.full_parameters(trainable_only=not is_full),
            load_tokenizer(run.model.path), is_main=is_main, seed=run.seed,
        )  # fmt: skip
        of_checkpoint = _size(outcome.checkpoint)
        dist.barrier()
        of_final = _size(place / "final.unfinished", but=("tokenizer", "special", "chat")) if is_main else (0, 0)
        return of_checkpoint, of_final
    finally:
        strategy.close()
        if dist.get_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def is_near(planned: int, written: Written) -> bool:
    size, files = written
    return abs(planned - size) <= 0.01 * size + files * 65536


def check(world: WorldPool, cfg: Config, folder: Path) -> None:
    run = resolve(cfg, WorldShape(1, world.size))
    checkpoint, final = world.run(saved, cells.dump(cfg), str(folder))[0]
    assert is_near(saved_state_bytes(run), checkpoint), (saved_state_bytes(run), checkpoint)
    assert is_near(final_bytes(run), final), (final_bytes(run), final)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that half of a tensor's bytes, or a state too few, is no rounding error."""
    from tests.helpers.tiny_model import build_base

    return build_base(tmp_path_factory.mktemp("base"), hidden_size=192, intermediate_size=640)


def large(method: str) -> dict[str, Any]:
    """A method of ``cells``, with more to save."""
    settings = cells.METHODS[method]
    more = {"r": 64} if "r" in settings else {}
    return settings | more | ({"num_virtual_tokens": 500} if "num_virtual_tokens" in settings else {})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_and_an_adapter_under_every_strategy(world: Worlds, base: Path, tmp_path: Path, strategy: str) -> None:
    for method in ("full", "lora"):
        check(world(1), cells.config(str(base), large(method), strategy), tmp_path / method)


@pytest.mark.parametrize("method", ["qlora", "prompt", "p_tuning", "prefix", "prefix projection"])
def test_every_method(world: Worlds, base: Path, tmp_path: Path, method: str) -> None:
    check(world(1), cells.config(str(base), large(method), "ddp"), tmp_path / "run")


@pytest.mark.ci
@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "ddp"])
def test_every_method_under_every_strategy(world: Worlds, base: Path, tmp_path: Path, strategy: str) -> None:
    for method in cells.METHODS.keys() - {"full", "lora", "prompt text"}:
        check(world(1), cells.config(str(base), large(method), strategy), tmp_path / method)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("ddp", {"precision": {"compute": "bf16", "master": "bf16"}}),
    "bf16 and fp32 masters": ("ddp", {"precision": {"compute": "bf16"}}),
    "bf16 under ZeRO": ("zero2", {"precision": {"compute": "bf16", "optimizer_state": "bf16"}}),
    "8bit": ("fsdp2", {"precision": {"compute": "fp32", "optimizer_state": "8bit"}}),
    "adafactor": ("fsdp2", {"optim": {"type": "adafactor", "lr": 1e-3}}),
    "sgd": ("ddp", {"optim": {"type": "sgd", "lr": 1e-3}}),
    "sgd with momentum": ("zero1", {"optim": {"type": "sgd", "lr": 1e-3, "momentum": 0.9}}),
    "pissa": ("ddp", {"method": {"type": "lora", "r": 32, "alpha": 16, "init": "pissa"}}),
    "dora": ("ddp", {"method": {"type": "lora", "r": 32, "alpha": 16, "dora": True}}),
    "modules_to_save": ("ddp", {"method": {"type": "lora", "r": 4, "alpha": 16, "modules_to_save": ["lm_head"]}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_states_and_adapters(world: Worlds, base: Path, tmp_path: Path, variant: str) -> None:
    strategy, sections = VARIANTS[variant]
    method = sections.get("method", "full")
    rest = {name: section for name, section in sections.items() if name != "method"}
    check(world(1), cells.config(str(base), method, strategy, **rest), tmp_path / "run")


def test_shards_of_two_ranks_are_one_checkpoint(world: Worlds, base: Path, tmp_path: Path) -> None:
    sections = {"precision": {"compute": "fp32", "optimizer_state": "8bit"}}
    check(world(2), cells.config(str(base), "full", "fsdp2", **sections), tmp_path / "run")


def _data(steps: int, sequences: int) -> DataPlan:
    return DataPlan(
        "assumed", 10, Range(1, 1, 1), 1, sequences, 1, 1, 0, steps, 1, 1, 1, 0, 0, cache_bytes=5, source=""
    )  # fmt: skip


@pytest.mark.parametrize("every", [None, 1, 2, 3, 4, 6, 7, 100])
@pytest.mark.parametrize("steps", [1, 5, 6, 12, 13])
@pytest.mark.parametrize("sequences", [1, 20, 28, 700])
def test_checkpoints_are_those_that_the_loop_writes(
    tiny_base: Path, every: int | None, steps: int, sequences: int
) -> None:
    run = _run(tiny_base, checkpoint={"every_steps": every})
    per_epoch = run.batch.steps_per_epoch(sequences)
    # As ``Training`` decides after each step.
    written = [n for n in range(1, steps + 1) if n == steps or (every and n % every == 0) or n % per_epoch == 0]
    assert num_checkpoints(run, _data(steps, sequences)) == len(written)


_runs: dict[str, Run] = {}


def _run(base: Path, strategy: str = "ddp", method: str = "full", size: int = 1, **sections: Any) -> Run:
    """Resolved once for each strategy and method; the section of checkpoints is put in."""
    key = f"{base} {strategy} {method} {size}"
    cfg = cells.config(str(base), method, strategy, **sections)
    if key not in _runs:
        _runs[key] = resolve(cfg, WorldShape(1, size))
    return replace(_runs[key], checkpoint=cfg.checkpoint)


def test_one_more_checkpoint_than_stays_is_on_the_disk(tiny_base: Path) -> None:
    run = _run(tiny_base, checkpoint={"keep_last": 3, "every_steps": 1})
    one = saved_state_bytes(run)
    assert disk_bytes(run, None) == {"checkpoints": 4 * one, "final": final_bytes(run)}
    assert disk_bytes(run, _data(steps=2, sequences=700)) == {
        "cache": 5, "checkpoints": 2 * one, "final": final_bytes(run)
    }  # fmt: skip


def test_the_first_checkpoint_of_every_period_is_counted(tiny_base: Path) -> None:
    run = _run(tiny_base, checkpoint={"keep_last": 2, "keep_every_hours": 2.5, "every_steps": 1})
    one, data = saved_state_bytes(run), _data(steps=100, sequences=700)
    for hours, periods in ((2.4, 0), (2.6, 1), (24.0, 9)):
        assert disk_bytes(run, data, total_s=3600 * hours)["checkpoints"] == (3 + periods) * one
    assert disk_bytes(run, data)["checkpoints"] == 3 * one, "the time is not known"
    few = _data(steps=5, sequences=700)
    assert disk_bytes(run, few, total_s=3600 * 24)["checkpoints"] == 5 * one, "no more than are written"


def test_what_the_clock_and_evaluations_save_is_counted(tiny_base: Path) -> None:
    data = replace(_data(steps=4, sequences=700), evaluations=3)
    for rules, total_s, count in (
        ({}, None, 1),
        ({"every_minutes": 30}, None, 6),
        ({"every_minutes": 30}, 3700.0, 3),
        ({"keep_best": True}, None, 4),
    ):
        run = _run(tiny_base, checkpoint={"keep_last": 5, **rules})
        assert disk_bytes(run, data, total_s=total_s)["checkpoints"] == count * saved_state_bytes(run), rules


def trained(cfg_yaml: str) -> DataPlan:
    """A whole run, and what is known of its data."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    world = World(dist.get_rank(), dist.get_rank(), WorldShape(1, dist.get_world_size()))
    run, data = resolve(cfg, world.shape), cells.synthetic_data()
    inputs = ready.Inputs(data, None, load_renderer(run.model.path, None, None), None)
    seen = outlook.look_ahead(cfg, run, cells.CPU, data, None)
    signals: Any = SimpleNamespace(noted=0, while_training=nullcontext)
    train_run.train(run, cfg, ready.Process(world, cells.CPU, cells.store()), inputs, seen, signals)
    return counted_plan(run, data, None, source="")


@pytest.mark.parametrize(
    ("rules", "spikes", "steps"),
    [
        ({"keep_last": 9}, {"policy": "roll_back"}, [0, 1, 2, 3]),
        ({"keep_last": 9}, {"non_finite": "roll_back"}, [0, 1, 2, 3]),
        ({"keep_last": 1, "keep_every_hours": 1e-7}, {}, [1, 2, 3]),
    ],
)
def test_what_a_run_keeps_is_what_its_plan_counts(
    world: Worlds, base: Path, tmp_path: Path, rules: dict[str, Any], spikes: dict[str, Any], steps: list[int]
) -> None:
    plain = cells.config(
        str(base), "full", "ddp", train={"max_steps": 3}, checkpoint={"every_steps": 1, **rules}, spikes=spikes
    )
    cfg = cells.whole_run(plain, tmp_path / "run")
    (tmp_path / "run").mkdir()
    data = world(1).run(trained, cells.dump(cfg))[0]
    folders = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert [int(path.name.removeprefix("step-")) for path in folders] == steps
    sizes = [_size(folder) for folder in folders]
    written = sum(size for size, _ in sizes), sum(files for _, files in sizes)
    planned = disk_bytes(resolve(cfg, WorldShape(1, 1)), data, total_s=1.0)
    assert is_near(planned["checkpoints"], written), (planned, written)


def test_host_memory_of_saving(tiny_base: Path) -> None:
    never = {"checkpoint": {"prove_final": False}}
    at_once = {"checkpoint": {"prove_final": False, "asynchronous": False}}
    ddp, zero = (_run(tiny_base, s, size=4, **at_once) for s in ("ddp", "zero2"))
    state = 3 * 4 * ddp.model.num_trainable
    assert state <= save_host_bytes(ddp) == save_host_bytes(zero) <= state * 1.001, "each rank's part of it, no more"
    kept = save_host_bytes(_run(tiny_base, "ddp", size=4, **never))
    assert state <= kept <= 2 * state, "rounded up to powers of two"
    lora = _run(tiny_base, "fsdp2", "lora", size=4, **never)
    proven = replace(lora, checkpoint=lora.checkpoint.model_copy(update={"prove_final": True}))
    assert save_host_bytes(proven) == 4 * lora.model.num_parameters
    assert isinstance(ddp.model.method, FullMethod)
