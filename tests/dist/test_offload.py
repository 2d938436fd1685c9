"""ZeRO with its optimizer and parameters in host memory: the same training, and really on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from sft_dist.config.schema import Config
from sft_dist.errors import ShardingMismatch
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.verify import verify_sharding
from sft_dist.sharding.zero import Zero
from sft_dist.sharding.zero_engine import deepspeed_config
from tests.dist.test_parity import METHODS, assert_equal_runs, assert_sharded_as_described
from tests.helpers import cells
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

ROOT = Path(__file__).parents[2]
CPU = {"device": "cpu"}
OFFLOADS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"offload_optimizer": CPU}},
    "zero2": {"zero_optimization": {"offload_optimizer": CPU}},
    "zero3": str(ROOT / "configs/deepspeed/zero3_offload.json"),  # type: ignore[dict-item]
}


def offloaded(base: Path, method: str, strategy: str, **sections: Any) -> Config:
    sharding = {"strategy": strategy, "deepspeed_config": OFFLOADS[strategy]}
    return cells.config(str(base), method, strategy, sharding=sharding, **sections)


# Three micro-batches on each of two ranks: what is accumulated on the host counts too.
ACCUMULATED = {"train": {"global_batch_size": 6, "micro_batch_size": 1, "max_steps": 6, "seed": 3}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", OFFLOADS)
def test_the_same_losses_as_ddp(world: World, tiny_base: Path, strategy: str, method: str) -> None:
    cfg = offloaded(tiny_base, method, strategy, **ACCUMULATED)
    trained = world(2).run(cells.train, cells.dump(cfg), None, 2)
    reference = world(1).run(
        cells.train, cells.dump(cells.config(str(tiny_base), method, "ddp", **ACCUMULATED)), None, 2
    )[0]
    assert max(reference.grad_norms) > 0.5, "clipping must be active in this test"
    assert_equal_runs(trained, reference)
    np.testing.assert_allclose(trained[0].eval_losses, reference.eval_losses, rtol=1e-5)
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize("strategy", OFFLOADS)
def test_in_bf16_too(world: World, tiny_base: Path, strategy: str) -> None:
    """Tolerances as in the parity test: regrouped micro-batches regroup bf16's roundings."""
    bf16 = {"precision": {"compute": "bf16"}}
    cfg = offloaded(tiny_base, "full", strategy, **ACCUMULATED, **bf16)
    trained = world(2).run(cells.train, cells.dump(cfg))
    reference = world(1).run(
        cells.train, cells.dump(cells.config(str(tiny_base), "full", "ddp", **ACCUMULATED, **bf16))
    )[0]
    np.testing.assert_allclose(trained[0].losses, reference.losses, rtol=1e-2)
    assert_sharded_as_described(cfg, trained)


def what_deepspeed_did(text: str) -> tuple[list[str], bool, str, set[str]]:
    """Parts on the host as the optimizer has them, the engine's own answer, who steps, and devices of the masters."""
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    assert isinstance(strategy, Zero)
    engine: Any = strategy.engine
    try:
        devices = {master.device.type for master in strategy.master_weights()}
        return (
            sorted(strategy.parts_on_host()), bool(engine.zero_use_cpu_optimizer()),
            type(engine.basic_optimizer).__name__, devices,
        )  # fmt: skip
    finally:
        strategy.close()


@pytest.mark.parametrize("strategy", OFFLOADS)
def test_deepspeed_did_what_was_asked(world: World, tiny_base: Path, strategy: str) -> None:
    parts = ["optimizer", "parameters"] if strategy == "zero3" else ["optimizer"]
    for answer in world(2).run(what_deepspeed_did, cells.dump(offloaded(tiny_base, "lora", strategy))):
        assert answer == (parts, True, "AdamW", {"cpu"})
    for answer in world(2).run(what_deepspeed_did, cells.dump(cells.config(str(tiny_base), "lora", strategy))):
        assert answer == ([], False, "AdamW", {"cpu"})


def message_of_mismatch(described: str, applied: str) -> str:
    runs = [resolve(Config.model_validate(yaml.safe_load(t)), WorldShape(1, 2)) for t in (described, applied)]
    strategy = registry.apply(runs[1], cells.CPU)
    try:
        verify_sharding(strategy, registry.describe(runs[0], dist.get_rank()))
    except ShardingMismatch as e:
        return e.what
    finally:
        strategy.close()
    return ""


@pytest.mark.parametrize("strategy", OFFLOADS)
def test_an_offload_that_did_not_happen_is_found(world: World, tiny_base: Path, strategy: str) -> None:
    texts = [
        cells.dump(offloaded(tiny_base, "full", strategy)),
        cells.dump(cells.config(str(tiny_base), "full", strategy)),
    ]
    for message in world(2).run(message_of_mismatch, *texts):
        assert "rank 0: nothing is kept in host memory, described ['optimizer'" in message
    for message in world(2).run(message_of_mismatch, *reversed(texts)):
        assert "is kept in host memory, described nothing" in message


# Each knob away from its default, as far as a CPU has both.
TURNED = {
    "contiguous_gradients": False, "reduce_scatter": False, "reduce_bucket_size": 4096,
}  # fmt: skip
TURNED_12 = {"use_multi_rank_bucket_allreduce": False, "allgather_bucket_size": 4096, "round_robin_gradients": True}
TURNED_3 = {
    "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_use_all_reduce_for_fetch_params": True, "stage3_allgather_sequential": True, "sub_group_size": 1000,
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_turned_knobs_change_nothing_but_the_way(world: World, tiny_base: Path, strategy: str, method: str) -> None:
    knobs = TURNED | (TURNED_3 if strategy == "zero3" else TURNED_12)
    sharding = {"strategy": strategy, "deepspeed_config": {"zero_optimization": knobs}}
    cfg = cells.config(str(tiny_base), method, strategy, sharding=sharding, **ACCUMULATED)
    given = deepspeed_config(resolve(cfg, WorldShape(1, 2)))["zero_optimization"]
    assert {name: given[name] for name in knobs} == knobs
    reference = world(1).run(cells.train, cells.dump(cells.config(str(tiny_base), method, "ddp", **ACCUMULATED)))[0]
    assert_equal_runs(world(2).run(cells.train, cells.dump(cfg)), reference)
