"""The same training on one process and on several, under every strategy: same losses, same norms, and really sharded.

Every cell is ten optimizer steps in fp32 on packed rows with uneven masks, with gradients clipped and accumulated. The
last step of an epoch is smaller than the others and leaves ranks without work, so empty micro-batches are part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from sft_dist.config.schema import Config
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import activation_checkpointing, registry
from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
METHODS = ("full", "lora", "qlora")
TOLERANCE = 1e-5
SGD = {"optim": {"type": "sgd", "lr": 0.3, "momentum": 0.9, "max_grad_norm": 0.5, "warmup_ratio": 0.2}}
BF16 = {"precision": {"compute": "bf16", "master": "fp32", "reduce": "fp32"}}


@pytest.fixture(scope="module")
def alone(world: World) -> Callable[..., Trained]:
    """``alone(config)``: the same run in one process, trained once for all cells that compare with it."""

    @cache
    def train(text: str, *args: Any) -> Trained:
        return world(1).run(cells.train, text, *args)[0]

    return lambda cfg, *args: train(cells.dump(cfg), *args)


def assert_equal_runs(trained: list[Trained], reference: Trained, tolerance: float = TOLERANCE) -> None:
    for rank in trained:
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=tolerance)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=tolerance)


def assert_sharded_as_described(cfg: Config, trained: list[Trained]) -> None:
    """What each rank measured after training against ``describe``, which this process computes without any group."""
    run = resolve(cfg, WorldShape(1, len(trained)))
    for rank, got in enumerate(trained):
        spec = registry.describe(run, rank)
        names = {"fp32": "float32", "bf16": "bfloat16"}
        assert got.local == {p.name: (p.local_numel, names[p.dtype], p.requires_grad) for p in spec.parameters}
        assert got.optimizer_numel == spec.optimizer_numel


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(
    world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str, method: str
) -> None:
    cfg = cells.config(str(tiny_base), method, strategy)
    trained = world(2).run(cells.train, cells.dump(cfg))
    reference = alone(cells.config(str(tiny_base), method, "ddp"))
    assert max(reference.grad_norms) > 0.5, "clipping must be active in this test"
    assert reference.losses[-1] < reference.losses[0]
    assert_equal_runs(trained, reference)
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_three_processes_equal_one(
    world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str, method: str
) -> None:
    """Three divides no dimension of the model: shards are uneven and padded."""
    cfg = cells.config(str(tiny_base), method, strategy)
    trained = world(3).run(cells.train, cells.dump(cfg))
    assert_equal_runs(trained, alone(cells.config(str(tiny_base), method, "ddp")))
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sgd_sees_the_scale_of_the_gradient(
    world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str
) -> None:
    """AdamW cancels a constant factor of the gradient; SGD does not."""
    cfg = cells.config(str(tiny_base), "full", strategy, **SGD)
    reference = alone(cells.config(str(tiny_base), "full", "ddp", **SGD))
    assert_equal_runs(world(2).run(cells.train, cells.dump(cfg)), reference)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_stays_near_one_process(
    world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str
) -> None:
    """bf16 keeps 8 bits: a product rounds by up to 2^-9, and regrouping micro-batches regroups the roundings.

    Over ten steps that moves the loss by less than 1e-2 relative here and the norm by less than 5e-2.
    """
    cfg = cells.config(str(tiny_base), "full", strategy, **BF16)
    trained = world(2).run(cells.train, cells.dump(cfg))
    reference = alone(cells.config(str(tiny_base), "full", "ddp", **BF16))
    np.testing.assert_allclose(trained[0].losses, reference.losses, rtol=1e-2)
    np.testing.assert_allclose(trained[0].grad_norms, reference.grad_norms, rtol=5e-2)
    assert_sharded_as_described(cfg, trained)
    assert all(
        dtype == ("bfloat16" if strategy.startswith("zero") else "float32") for _, dtype, _ in trained[0].local.values()
    )
    for name, weight in trained[0].weights.items():
        # What is handed on is the fp32 master, of which bf16 would keep the upper half of the bits.
        assert np.count_nonzero(weight.view(np.uint32) & 0xFFFF) > weight.size / 2, name


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3"])
def test_bf16_gradients_are_added_up_in_fp32(world: World, tiny_base: Path, strategy: str) -> None:
    """The same four bf16 micro-batches a rank as under DDP, so the norm of their sum is the same far beyond bf16."""
    train = {"global_batch_size": 8, "micro_batch_size": 1, "max_steps": 1, "seed": 3}
    norms = [
        world(2)
        .run(cells.train, cells.dump(cells.config(str(tiny_base), "full", s, train=train, **BF16)))[0]
        .grad_norms
        for s in ("ddp", strategy)
    ]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("mode", [{"mode": "none"}, {"mode": "every_k", "k": 2}])
def test_checkpointing_changes_nothing(
    world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str, method: str, mode: dict[str, Any]
) -> None:
    """The other cells recompute every block; here none or every second one is."""
    cfg = cells.config(str(tiny_base), method, strategy, activation_checkpointing=mode, train={
        "global_batch_size": 7, "micro_batch_size": 2, "max_steps": 3, "seed": 3})  # fmt: skip
    full = cells.config(str(tiny_base), method, "ddp", train=cfg.train.model_dump())
    assert_equal_runs(world(2).run(cells.train, cells.dump(cfg)), alone(full))


def train_with_tiny_layers_kept(text: str) -> Trained:
    """Of the tiny model's products too every second one is kept."""
    with patch.object(activation_checkpointing, "LOW_RANK", 8):
        return cells.train(text)


@pytest.mark.parametrize(
    ("strategy", "method"),
    [("fsdp2", "full"), ("fsdp2", "qlora"), ("zero3", "lora"), ("zero3", "qlora"), ("ddp", "lora")],
)
def test_selective_and_offloaded_checkpoints_change_nothing(
    world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str, method: str
) -> None:
    """What is kept was computed once from the same numbers."""
    mode = {"mode": "selective", "offload": True}
    cfg = cells.config(str(tiny_base), method, strategy, activation_checkpointing=mode)
    trained = world(2).run(train_with_tiny_layers_kept, cells.dump(cfg))
    assert_equal_runs(trained, alone(cells.config(str(tiny_base), method, "ddp")))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tied_embeddings(world: World, alone: Callable[..., Trained], tied_base: Path, strategy: str) -> None:
    cfg = cells.config(str(tied_base), "full", strategy)
    trained = world(2).run(cells.train, cells.dump(cfg))
    assert_equal_runs(trained, alone(cells.config(str(tied_base), "full", "ddp")))
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_after_training_are_equal(
    world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str
) -> None:
    """What export would write: gathered from its shards, in the master's precision."""
    trained = world(2).run(cells.train, cells.dump(cells.config(str(tiny_base), "lora", strategy)))[0]
    reference = alone(cells.config(str(tiny_base), "lora", "ddp"))
    assert trained.weights.keys() == reference.weights.keys()
    assert len(trained.weights) == 2 * 7 * 2  # A and B on seven linears of two blocks
    for name, weight in reference.weights.items():
        np.testing.assert_allclose(trained.weights[name], weight, rtol=1e-3, atol=1e-5, err_msg=name)


def test_fsdp2_without_resharding(world: World, alone: Callable[..., Trained], tiny_base: Path) -> None:
    cfg = cells.config(str(tiny_base), "full", "fsdp2", sharding={"strategy": "fsdp2", "reshard_after_forward": False})
    assert_equal_runs(world(2).run(cells.train, cells.dump(cfg)), alone(cells.config(str(tiny_base), "full", "ddp")))


@pytest.mark.parametrize(
    ("method", "sharding", "size"),
    [("full", {}, 2), ("lora", {"dp_replicate": 2}, 4), ("qlora", {"cpu_offload": True, "reshard_after_forward": False}, 2)],
    ids=str,
)  # fmt: skip
def test_fsdp2_that_reduces_once_a_step(
    world: World, alone: Callable[..., Trained], tiny_base: Path, method: str, sharding: dict[str, Any], size: int
) -> None:
    """Gradients are added up over micro-batches first and over ranks then: the same sums."""
    settings = {"strategy": "fsdp2", "reduce_once_a_step": True} | sharding
    cfg = cells.config(str(tiny_base), method, "fsdp2", sharding=settings, train={"micro_batch_size": 1})
    assert resolve(cfg, WorldShape(1, size)).batch.gradient_accumulation_steps > 1
    trained = world(size).run(cells.train, cells.dump(cfg))
    assert_equal_runs(trained, alone(cells.config(str(tiny_base), method, "ddp")))
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reduced_in_bf16(world: World, alone: Callable[..., Trained], tiny_base: Path, strategy: str) -> None:
    """fp32 compute with a bf16 reduction: near the exact run, and not equal to it, so the setting has its effect."""
    precision = {"compute": "fp32", "master": "fp32", "reduce": "bf16"}
    cfg = cells.config(str(tiny_base), "full", strategy, precision=precision)
    trained = world(2).run(cells.train, cells.dump(cfg))[0]
    reference = alone(cells.config(str(tiny_base), "full", "ddp"))
    np.testing.assert_allclose(trained.losses, reference.losses, rtol=1e-2)
    np.testing.assert_allclose(trained.grad_norms, reference.grad_norms, rtol=1e-2)
    assert np.abs(np.array(trained.losses) / reference.losses - 1).max() > 1e-6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bf16_master_weights(world: World, tiny_base: Path, strategy: str) -> None:
    precision = {"compute": "bf16", "master": "bf16", "reduce": "fp32"}
    cfg = cells.config(str(tiny_base), "full", strategy, precision=precision)
    trained = world(2).run(cells.train, cells.dump(cfg))
    assert_sharded_as_described(cfg, trained)
    assert {dtype for _, dtype, _ in trained[0].local.values()} == {"bfloat16"}
    assert trained[0].losses[-1] < trained[0].losses[0]


def test_memory_is_divided(tiny_base: Path) -> None:
    """The point of sharding, in numbers: bytes of parameters on the fullest of three ranks."""

    def fullest(strategy: str) -> int:
        run = resolve(cells.config(str(tiny_base), "full", strategy), WorldShape(1, 3))
        return max(registry.describe(run, rank).parameter_bytes for rank in range(3))

    total = fullest("ddp")
    run = resolve(cells.config(str(tiny_base), "full", "ddp"), WorldShape())
    assert total == run.model.num_trainable * DTYPE_BYTES["fp32"]
    assert fullest("zero1") == fullest("zero2") == total
    assert total / 3 <= fullest("fsdp2") < total / 2.9
    assert total / 3 <= fullest("zero3") < total / 2.9
