"""What travels between the processes: when, in which dtype and in how large pieces.

Losses do not show any of it: reducing in every micro-batch, gathering the whole model at once or reducing in another
dtype than the one that was asked for trains the same, only slower, larger or less exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from sft_dist.config.schema import Config
from sft_dist.data.loader import collate
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.verify import verify_sharding
from tests.helpers import cells
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

MICRO_BATCHES = 3


@dataclass
class Traffic:
    """Collectives of one call on one rank: (dtype, elements), the larger side of each."""

    reduced: list[tuple[str, int]] = field(default_factory=list)
    gathered: list[tuple[str, int]] = field(default_factory=list)


class Listening(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel)
            entry = (str(largest.dtype).removeprefix("torch."), largest.numel())
            if "reduce" in name and largest.numel() > 1:
                self.traffic.reduced.append(entry)
            elif "allgather" in name:
                self.traffic.gathered.append(entry)
        return function(*args, **(kwargs or {}))


def listen(text: str) -> list[Traffic]:
    """The traffic of each of three micro-batches of the second step: the first may set things up."""
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    rank = dist.get_rank()
    data = cells.synthetic_data(rows=2 * MICRO_BATCHES, packing=False)
    try:
        for _ in range(2):
            heard: list[Traffic] = []
            for number in range(MICRO_BATCHES):
                heard.append(Traffic())
                batch = collate(data, [2 * number + rank])
                with Listening(heard[-1]):
                    strategy.forward_backward(
                        batch, supervised_in_step=20, is_last_micro_batch=number == MICRO_BATCHES - 1
                    )
            strategy.step(1e-3)
        return heard
    finally:
        strategy.close()


def heard_by(world: World, cfg: Config) -> list[Traffic]:
    first, second = world(2).run(listen, cells.dump(cfg))
    assert first == second, "every rank takes part in the same collectives"
    return list(first)


@pytest.mark.parametrize(
    ("strategy", "compute", "master", "reduce"),
    [
        *((s, c, "fp32", r) for s in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for c, r in (("bf16", "fp32"), ("fp32", "bf16"))),
        ("ddp", "bf16", "bf16", "fp32"), ("fsdp2", "bf16", "bf16", "fp32"), ("ddp", "bf16", "bf16", "bf16"),
        ("zero1", "bf16", "fp32", "bf16"), ("zero3", "bf16", "fp32", "bf16"),
    ],
)  # fmt: skip
def test_gradients_travel_when_and_as_they_should(
    world: World, tiny_base: Path, strategy: str, compute: str, master: str, reduce: str
) -> None:
    """FSDP2, ZeRO-2 and 3 keep no whole gradient, so they reduce in every micro-batch; the others only in the last."""
    cfg = cells.config(
        str(tiny_base), "lora", strategy, precision={"compute": compute, "master": master, "reduce": reduce}
    )
    traffic = heard_by(world, cfg)
    every_time = strategy in ("fsdp2", "zero2", "zero3")
    assert [bool(t.reduced) for t in traffic] == [every_time, every_time, True]
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[reduce]
    assert {d for t in traffic for d, _ in t.reduced} == {dtype}
    trainable = resolve(cfg, WorldShape(1, 2)).model.num_trainable
    for t in traffic:
        if t.reduced:
            # Each gradient once; shards of uneven parameters are padded.
            assert trainable <= sum(numel for _, numel in t.reduced) <= 1.01 * trainable


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_gathers_a_block_at_a_time(world: World, tiny_base: Path, reshard: bool) -> None:
    cfg = cells.config(
        str(tiny_base), "full", "fsdp2",
        precision={"compute": "bf16"}, sharding={"strategy": "fsdp2", "reshard_after_forward": reshard},
    )  # fmt: skip
    model = resolve(cfg, WorldShape(1, 2)).model
    blocks = [sum(p.numel for p in model.parameters if f".layers.{i}." in p.name) for i in range(model.num_layers)]
    root = model.num_trainable - sum(blocks)
    # What is not freed after forward stays gathered for the step: the root, and blocks that are kept.
    every_time = sorted([*blocks, *blocks]) if reshard else []
    at_first = sorted([root, *every_time]) if reshard else sorted([root, *blocks])
    for number, traffic in enumerate(heard_by(world, cfg)):
        expected = every_time if number else at_first
        dtypes = {dtype for dtype, _ in traffic.gathered}
        assert dtypes == ({"bfloat16"} if expected else set()), "weights travel in the compute dtype"
        # Dimensions that two divides unevenly are padded.
        sizes = sorted(numel for _, numel in traffic.gathered)
        assert sizes == pytest.approx(expected, rel=0.01)


def gradient_numel_between_micro_batches(text: str) -> int:
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    rank = dist.get_rank()
    try:
        batch = collate(cells.synthetic_data(rows=2, packing=False), [rank])
        strategy.forward_backward(batch, supervised_in_step=20, is_last_micro_batch=False)
        # Those of the modules are whole where something stays gathered, and have no gradient.
        kept = [p for m in strategy.model.modules() if isinstance(m, FSDPModule) for p in _fsdp_parameters(m)]
        gradients = [p.sharded_param.grad for p in kept if p.sharded_param.grad is not None]
        waiting = [p.unsharded_accumulated_grad for p in kept if p.unsharded_accumulated_grad is not None]
        return sum(g.to_local().numel() for g in gradients) + sum(g.numel() for g in waiting)
    finally:
        strategy.close()


def _fsdp_parameters(module: FSDPModule) -> list[Any]:
    group = module._get_fsdp_state()._fsdp_param_group
    return [] if group is None else group.fsdp_params


def test_fsdp2_holds_its_shard_of_the_gradients(world: World, tiny_base: Path) -> None:
    """Between micro-batches too, where waiting for the last one would leave each rank with all of them."""
    cfg = cells.config(str(tiny_base), "full", "fsdp2")
    run = resolve(cfg, WorldShape(1, 2))
    held = world(2).run(gradient_numel_between_micro_batches, cells.dump(cfg))
    assert held == [registry.describe(run, rank).optimizer_numel for rank in (0, 1)]
    waits = cells.config(
        str(tiny_base), "full", "fsdp2", sharding={"strategy": "fsdp2", "reduce_once_a_step": True},
        precision={"compute": "bf16"},
    )  # fmt: skip
    held = world(2).run(gradient_numel_between_micro_batches, cells.dump(waits))
    assert held == [run.model.num_trainable] * 2


def evaluate_and_verify(text: str) -> None:
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    rank = dist.get_rank()
    try:
        strategy.evaluate(collate(cells.synthetic_data(rows=2, packing=False), [rank]))
        verify_sharding(strategy, registry.describe(run, rank))
    finally:
        strategy.close()


@pytest.mark.parametrize(
    "sharding",
    [
        {"strategy": "fsdp2"},
        {"strategy": "fsdp2", "reshard_after_forward": False},
    ],
    ids=["reshards", "keeps"],
)
def test_nothing_stays_gathered_after_an_evaluation(world: World, tiny_base: Path, sharding: dict[str, Any]) -> None:
    """Else the last evaluation hands compute weights, not the master's, to the export."""
    cfg = cells.config(str(tiny_base), "lora", "fsdp2", sharding=sharding, precision={"compute": "bf16"})
    world(2).run(evaluate_and_verify, cells.dump(cfg))
