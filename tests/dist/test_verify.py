"""The checks at the start of every run, broken on purpose: each must notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from sft_dist.config.schema import Config
from sft_dist.errors import ShardingMismatch
from sft_dist.model.build import build_model
from sft_dist.model.weights import Weights
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.spec import ParameterShard, ShardingSpec
from sft_dist.sharding.verify import MovementCheck, differences_of, verify_sharding
from tests.helpers import cells
from tests.helpers.loaded import load_model
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]


def message_of_mismatch(text: str, applied: str, breakage: str) -> str:
    """What ``verify_sharding`` says when the run was described as ``text`` has it but something else was done."""
    run = resolve(Config.model_validate(yaml.safe_load(text)), WorldShape(1, dist.get_world_size()))
    other = cells.config(run.model.path, run.model.method.type, applied)
    applied_run = resolve(other, run.world)
    model = build_model(run.model)
    if breakage == "thawed":
        next(p for p in model.parameters() if not p.requires_grad).requires_grad_(True)
    strategy = registry.shard(applied_run, model, cells.CPU, Weights(model, run.model, seed=0))
    if breakage == "dtype on rank 1" and dist.get_rank() == 1:
        parameter = next(iter(model.parameters()))
        parameter.data = parameter.data.to(torch.float64)
    if breakage == "optimizer in bf16":
        strategy.optimizer.param_groups[0]["params"] = [m.detach().bfloat16() for m in strategy.master_weights()]
        del strategy.optimizer.param_groups[1:]
    if breakage == "names":
        model.hf.renamed = model.hf._modules.pop("model")
    try:
        verify_sharding(strategy, registry.describe(run, dist.get_rank()))
    except ShardingMismatch as e:
        return e.what
    finally:
        strategy.close()
    return ""


@pytest.mark.parametrize(
    ("described", "applied"), [("fsdp2", "ddp"), ("zero3", "zero2"), ("zero1", "ddp"), ("fsdp2", "zero3")]
)
def test_replicas_that_pass_for_shards_are_found(world: World, tiny_base: Path, described: str, applied: str) -> None:
    """The classic: everything is replicated, and the losses are perfectly right."""
    text = cells.dump(cells.config(str(tiny_base), "full", described))
    for message in world(2).run(message_of_mismatch, text, applied, "strategy"):
        assert f"{described} did not shard as described: rank 0:" in message


def test_a_thawed_parameter_is_found(world: World, tiny_base: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), "lora", "fsdp2"))
    for message in world(2).run(message_of_mismatch, text, "fsdp2", "thawed"):
        assert "embed_tokens.weight has (numel, dtype, requires_grad)" in message


def test_a_difference_on_one_rank_fails_all(world: World, tiny_base: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), "full", "ddp"))
    for message in world(2).run(message_of_mismatch, text, "ddp", "dtype on rank 1"):
        assert "rank 1: hf.model.embed_tokens.weight" in message
        assert "torch.float64" in message


def test_an_optimizer_in_another_dtype_is_found(world: World, tiny_base: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), "full", "ddp"))
    for message in world(2).run(message_of_mismatch, text, "ddp", "optimizer in bf16"):
        assert "the optimizer holds {torch.bfloat16}, described fp32" in message


def test_other_names_are_found(world: World, tiny_base: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), "full", "ddp"))
    for message in world(2).run(message_of_mismatch, text, "ddp", "names"):
        assert "parameters with other names than the" in message


def stale_optimizer_message(text: str) -> str:
    """An optimizer made before ``fully_shard`` trains parameters that are gone, and nothing raises by itself."""
    run = resolve(Config.model_validate(yaml.safe_load(text)), WorldShape(1, dist.get_world_size()))
    stale = load_model(run.model, seed=0)
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    live = strategy.optimizer
    strategy.optimizer = build_optimizer(run.optim, run.precision, stale.named_parameters())
    check = MovementCheck(strategy)
    strategy.optimizer.step()
    try:
        check.verify(dist.get_rank())
    except ShardingMismatch as e:
        return e.what
    finally:
        strategy.optimizer = live
        strategy.close()
    return ""


def test_an_optimizer_over_stale_parameters_is_found(world: World, tiny_base: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), "full", "fsdp2"))
    for message in world(2).run(stale_optimizer_message, text):
        assert "no parameter moved in the first optimizer step on rank 0" in message


def held(weight: Tensor, master: Tensor, state_bytes: int | None) -> Mock:
    """A strategy that believes to have everything in host memory."""
    strategy = Mock()
    strategy.local_parameters.return_value = [("w", weight, True)]
    strategy.master_weights.return_value = [master]
    strategy.optimizer_state_bytes.return_value = state_bytes
    strategy.parts_on_host.return_value = frozenset({"parameters", "optimizer"})
    return strategy


HELD = ShardingSpec(
    "fsdp2", 0, (ParameterShard("w", 4, "fp32", True),), 4, "fp32", 32, frozenset({"parameters", "optimizer"})
)


@pytest.mark.parametrize("part", ["parameters", "optimizer"])
def test_what_is_elsewhere_than_in_host_memory_is_found(part: str) -> None:
    """The strategy may believe in an offload that moved nothing. Without a GPU, the meta device stands for one."""
    here, elsewhere = torch.zeros(4), torch.zeros(4, device="meta")
    strategy = held(elsewhere if part == "parameters" else here, elsewhere if part == "optimizer" else here, None)
    assert differences_of(strategy, HELD) == [f"{part} described in host memory are on ['meta']"]


def test_states_of_another_size_are_found() -> None:
    """They decide what fits a device. Before the first step a lazy optimizer has none."""
    weight = torch.zeros(4)
    for size, found in ((None, []), (32, []), (16, ["the optimizer's states take 16 bytes, described 32"])):
        assert differences_of(held(weight, weight, size), HELD) == found
