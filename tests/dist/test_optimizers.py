"""Optimizers with few bits or few states, over shards: the same training, the bytes that were described, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.plan.states import state_bytes
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.optim import unsupported_on
from tests.dist.test_offload import OFFLOADS
from tests.dist.test_parity import assert_equal_runs, assert_sharded_as_described
from tests.dist.test_resume import STOP, checkpoint, final_bytes, refusal, run_part
from tests.dist.test_resume import config as whole_run
from tests.helpers import cells
from tests.helpers.pool import WorldPool
from tests.helpers.tiny_model import build_model, build_tokenizer

World = Callable[[int], WorldPool]

pytestmark = pytest.mark.ci

ADAFACTOR = {
    "optim": {
        "type": "adafactor", "lr": 0.1, "scale_parameter": True, "max_grad_norm": 0.5, "weight_decay": 0.1,
        "warmup_ratio": 0.2,
    }
}  # fmt: skip


def states(kind: str, **precision: str) -> dict[str, Any]:
    return {"precision": {"compute": "fp32", "optimizer_state": kind, **precision}}


LOW_RATE = {"optim": {"lr": 1e-3, "max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_ratio": 0.2}}

CHOICES: dict[str, dict[str, Any]] = {
    "adafactor": ADAFACTOR,
    "adafactor, absolute rate": {"optim": {"type": "adafactor", "lr": 3e-3, "max_grad_norm": 0.5}},
    "bf16": states("bf16"),
    "bf16, low rate": states("bf16") | LOW_RATE,
    "8bit": states("8bit"),
    "bf16 weights": states("bf16", compute="bf16", master="bf16"),
    "bf16 weights, fp32 moments": states("fp32", compute="bf16", master="bf16"),
    "momentum": {"optim": {"type": "sgd", "lr": 0.3, "momentum": 0.9, "max_grad_norm": 0.5, "warmup_ratio": 0.2}},
    "adamw": {},
    "adamw, low rate": LOW_RATE,
}


def alone(world: World, base: Path, method: str, choice: str) -> cells.Trained:
    text = cells.dump(cells.config(str(base), method, "ddp", **CHOICES[choice]))
    return world(1).run(cells.train, text)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_adafactor_has_the_statistics_of_whole_tensors(
    world: World, tiny_base: Path, method: str, strategy: str, size: int
) -> None:
    """Of a shard's own rows alone, columns would be scaled otherwise, and the losses with them."""
    choice = "adafactor" if method == "full" else "adafactor, absolute rate"
    cfg = cells.config(str(tiny_base), method, strategy, **CHOICES[choice])
    trained, reference = world(size).run(cells.train, cells.dump(cfg)), alone(world, tiny_base, method, choice)
    assert reference.losses[-1] < reference.losses[0]
    assert_equal_runs(trained, reference)
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("fsdp2", 3)])
def test_bf16_moments_are_rounded_alike_by_all_ranks(world: World, tiny_base: Path, strategy: str, size: int) -> None:
    """By place and step, so that sharding changes nothing: of two runs whose gradients differ in the last bit of fp32,
    one element in 2^15 is rounded to the other neighbour, 2^-8 away, which the loss does not see.

    Which elements it is depends on the CPU's order of sums. A later gradient's norm sees them by as much as the rate
    moves weights: at 3e-3 by 1.2e-5 on one kind of CPU.
    """
    cfg = cells.config(str(tiny_base), "full", strategy, **CHOICES["bf16, low rate"])
    trained = world(size).run(cells.train, cells.dump(cfg))
    assert_equal_runs(trained, alone(world, tiny_base, "full", "bf16, low rate"))
    exact = alone(world, tiny_base, "full", "adamw, low rate")
    # And it is another training than with fp32 moments, by what 2^-8 of a moment is to an update.
    np.testing.assert_allclose(trained[0].losses, exact.losses, rtol=5e-3)
    assert np.abs(np.array(trained[0].losses) / exact.losses - 1).max() > 1e-6


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("compute", ["fp32", pytest.param("bf16", marks=pytest.mark.ci)])
def test_bf16_moments_under_deepspeed(world: World, tiny_base: Path, strategy: str, compute: str) -> None:
    """Its partitions are flat, so the places, and the chances, are others than one process's: near it, not equal."""
    precision = {"precision": {"compute": compute, "optimizer_state": "bf16"}}
    cfg = cells.config(str(tiny_base), "full", strategy, **precision)
    trained = world(2).run(cells.train, cells.dump(cfg))
    exact = cells.config(str(tiny_base), "full", strategy, precision={"compute": compute})
    np.testing.assert_allclose(
        trained[0].losses,
        world(2).run(cells.train, cells.dump(exact))[0].losses,
        rtol=5e-3 if compute == "fp32" else 1e-2,
    )
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_8bit_stays_near_fp32(world: World, tiny_base: Path, strategy: str, size: int) -> None:
    """A code is off by up to 1 part in 2^6 of the moment at its coarsest, and blocks begin elsewhere on other ranks:
    over six steps that moves the loss by less than 1e-2."""
    cfg = cells.config(str(tiny_base), "full", strategy, **CHOICES["8bit"])
    trained, exact = world(size).run(cells.train, cells.dump(cfg)), alone(world, tiny_base, "full", "adamw")
    np.testing.assert_allclose(trained[0].losses, exact.losses, rtol=1e-2)
    assert np.abs(np.array(trained[0].losses) / exact.losses - 1).max() > 1e-6
    assert_sharded_as_described(cfg, trained)


@pytest.mark.ci
@pytest.mark.parametrize("strategy", OFFLOADS)
def test_bf16_moments_in_host_memory_go_on_exactly(
    world: World, tiny_base: Path, tmp_path: Path, strategy: str
) -> None:
    sections = CHOICES["bf16"] | {"sharding": {"strategy": strategy, "deepspeed_config": OFFLOADS[strategy]}}
    whole = world(2).run(run_part, whole_run(tiny_base, tmp_path / "a", "full", strategy, **sections), None)[0]
    text = whole_run(tiny_base, tmp_path / "b", "full", strategy, **sections)
    assert world(2).run(run_part, text, checkpoint(tmp_path / "a"))[0].metrics == whole.metrics[STOP:]


@pytest.mark.ci
@pytest.mark.parametrize("choice", ["8bit", "adafactor"])
def test_the_host_steps_with_any_of_them(world: World, tiny_base: Path, choice: str) -> None:
    """FSDP2's shards in host memory: the numbers are those of shards on the device."""
    sharding = {"strategy": "fsdp2", "cpu_offload": True}
    plain = cells.config(str(tiny_base), "full", "fsdp2", **CHOICES[choice])
    offloaded = cells.config(str(tiny_base), "full", "fsdp2", sharding=sharding, **CHOICES[choice])
    losses = [world(2).run(cells.train, cells.dump(cfg))[0].losses for cfg in (plain, offloaded)]
    # Gradients are reduced in every micro-batch instead of once, which regroups their sum.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def bytes_after_a_step(text: str) -> int | None:
    cfg = Config.model_validate(yaml.safe_load(text))
    strategy = None
    try:
        _, strategy = cells.start_and_step(cfg)
        return strategy.optimizer_state_bytes()
    finally:
        if strategy is not None:
            strategy.close()


@pytest.mark.parametrize(
    ("choice", "strategy", "size"),
    [
        ("adafactor", "ddp", 2), ("adafactor", "fsdp2", 3), ("8bit", "ddp", 2), ("8bit", "fsdp2", 2), ("8bit", "fsdp2", 3),
        ("bf16", "ddp", 2), ("bf16", "zero3", 2), ("bf16 weights", "fsdp2", 2), ("bf16 weights, fp32 moments", "ddp", 2),
        ("momentum", "fsdp2", 2), ("momentum", "zero2", 2), ("adamw", "zero2", 2), ("adamw", "fsdp2", 3),
    ],
)  # fmt: skip
def test_the_plan_counts_the_bytes_that_are_there(
    world: World, tiny_base: Path, choice: str, strategy: str, size: int
) -> None:
    cfg = cells.config(str(tiny_base), "full", strategy, **CHOICES[choice])
    run = resolve(cfg, WorldShape(1, size))
    counted = [registry.describe(run, rank).optimizer_state_bytes for rank in range(size)]
    assert world(size).run(bytes_after_a_step, cells.dump(cfg)) == counted
    if not strategy.startswith("zero"):
        assert state_bytes(run).optimizer == counted[0]


@pytest.mark.parametrize(
    ("choice", "strategy", "method"),
    [
        ("adafactor", "fsdp2", "full"),
        ("bf16", "fsdp2", "full"),
        ("8bit", "fsdp2", "full"),
        ("bf16", "zero2", "full"),
        pytest.param("8bit", "ddp", "full", marks=pytest.mark.ci),
        pytest.param("bf16", "zero3", "lora", marks=pytest.mark.ci),
        pytest.param("bf16 weights", "fsdp2", "lora", marks=pytest.mark.ci),
    ],
)
def test_resumed_equals_uninterrupted(
    world: World, tiny_base: Path, tmp_path: Path, choice: str, strategy: str, method: str
) -> None:
    """Bit for bit: moments, scales, row and column means, and what is rounded by chance."""
    sections = CHOICES[choice]
    whole = world(2).run(run_part, whole_run(tiny_base, tmp_path / "a", method, strategy, **sections), None)[0]
    text = whole_run(tiny_base, tmp_path / "b", method, strategy, **sections)
    resumed = world(2).run(run_part, text, checkpoint(tmp_path / "a"))[0]
    assert resumed.metrics == whole.metrics[STOP:]
    assert final_bytes(tmp_path / "b") == final_bytes(tmp_path / "a") != {}


@pytest.mark.parametrize("choice", ["adafactor", pytest.param("bf16", marks=pytest.mark.ci)])
def test_they_go_on_under_another_strategy_and_world(
    world: World, tiny_base: Path, tmp_path: Path, choice: str
) -> None:
    start = None
    whole = world(1).run(run_part, whole_run(tiny_base, tmp_path / "a", "full", "ddp", **CHOICES[choice]), None)[0]
    for number, (strategy, size) in enumerate([("fsdp2", 3), ("ddp", 2), ("fsdp2", 2)]):
        text = whole_run(tiny_base, tmp_path / str(number), "full", strategy, **CHOICES[choice])
        part = world(size).run(run_part, text, start)[0]
        np.testing.assert_allclose(part.metrics, whole.metrics[STOP * number :], rtol=1e-5)
        start = checkpoint(tmp_path / str(number), STOP * (number + 1))


def test_8bit_blocks_that_end_where_shards_end_go_on_in_any_world(world: World, tmp_path: Path) -> None:
    """320 rows of 64: blocks of 256 are the same ones on one rank and on two. 259 rows on two: they are not."""
    even, odd = tmp_path / "even", tmp_path / "odd"
    for folder, vocab in ((even, 320), (odd, 259)):
        build_tokenizer(folder)
        build_model(folder, vocab_size=vocab)
    whole = world(1).run(run_part, whole_run(even, tmp_path / "a", "full", "ddp", **CHOICES["8bit"]), None)[0]
    world(2).run(run_part, whole_run(even, tmp_path / "b", "full", "fsdp2", **CHOICES["8bit"]), None)
    text = whole_run(even, tmp_path / "c", "full", "ddp", **CHOICES["8bit"])
    part = world(1).run(run_part, text, checkpoint(tmp_path / "b"))[0]
    np.testing.assert_allclose(part.metrics, whole.metrics[STOP:], rtol=1e-4)
    world(2).run(run_part, whole_run(odd, tmp_path / "d", "full", "fsdp2", **CHOICES["8bit"]), None)
    text = whole_run(odd, tmp_path / "e", "full", "ddp", **CHOICES["8bit"])
    ((kind, what),) = world(1).run(refusal, text, checkpoint(tmp_path / "d"))
    assert kind == "CheckpointError"
    assert "8-bit" in what
    assert "2 processes" in what


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (ADAFACTOR, "optim.type adafactor needs whole rows and columns"),
        (states("8bit"), "precision.optimizer_state 8bit needs blocks of one tensor"),
        ({"optim": {"type": "adamw", "paged": True}}, "optim.paged has its own way to host memory"),
    ],
)
def test_what_deepspeed_cannot_is_refused(
    tiny_base: Path, strategy: str, sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(cells.config(str(tiny_base), "full", strategy, **sections), WorldShape(1, 2))
    assert caught.value.what.startswith(reason)


def test_paged_moments_are_planned_and_refused_on_a_cpu(tiny_base: Path) -> None:
    cfg = cells.config(str(tiny_base), "full", "fsdp2", optim={"type": "adamw", "paged": True}, **states("8bit"))
    run = resolve(cfg, WorldShape(1, 2))
    planned = state_bytes(run)
    assert (planned.optimizer, planned.paged) == (0, registry.describe(run, 0).optimizer_state_bytes)
    assert unsupported_on(run, "cuda") is None
    assert (unsupported_on(run, "cpu") or "").startswith("optim.paged is true, but CUDA's managed memory needs a GPU")


@pytest.mark.parametrize(
    ("strategy", "size"),
    [("zero1", 2), *((name, 3) for name in ("ddp", "fsdp2", "zero2", "zero3"))],
)
def test_parts_without_decay(world: World, tiny_base: Path, strategy: str, size: int) -> None:
    """The optimizer's groups are as described, and hold the same parameters under every strategy."""
    sections: dict[str, Any] = {"optim": {"weight_decay": 30.0, "no_decay": ["embed_tokens", "q_proj"]}}
    reference = world(1).run(cells.train, cells.dump(cells.config(str(tiny_base), **sections)))[0]
    everything = world(1).run(cells.train, cells.dump(cells.config(str(tiny_base), optim={"weight_decay": 30.0})))[0]
    trained = world(size).run(cells.train, cells.dump(cells.config(str(tiny_base), "full", strategy, **sections)))
    for rank in trained:
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=1e-5)
    assert abs(everything.losses[-1] / reference.losses[-1] - 1) > 1e-3
