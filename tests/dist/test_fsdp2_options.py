"""FSDP2 with everything in host memory, and with several replicas: the same training, held as described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from torch.distributed.fsdp import CPUOffloadPolicy

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, ShardingMismatch
from sft_dist.plan.states import state_bytes
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.fsdp2 import Fsdp2
from sft_dist.sharding.verify import verify_sharding
from tests.dist.test_optimizers import ADAFACTOR, states
from tests.dist.test_parity import assert_equal_runs, assert_sharded_as_described
from tests.dist.test_resume import STOP, checkpoint, final_bytes, run_part
from tests.dist.test_resume import config as whole_run
from tests.helpers import cells
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

OFFLOADED: dict[str, Any] = {"strategy": "fsdp2", "cpu_offload": True}
REPLICATED: dict[str, Any] = {"strategy": "fsdp2", "dp_replicate": 2}


def fsdp2(base: Path, method: str, sharding: dict[str, Any], **sections: Any) -> Config:
    return cells.config(str(base), method, "fsdp2", sharding=sharding, **sections)


def alone(world: World, base: Path, method: str, **sections: Any) -> cells.Trained:
    text = cells.dump(cells.config(str(base), method, "ddp", **sections))
    return world(1).run(cells.train, text, None, 2)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "sharding", "sections"),
    [
        ("full", OFFLOADED, {}),
        pytest.param("lora", OFFLOADED, {}, marks=pytest.mark.ci),
        ("qlora", OFFLOADED, {}),
        pytest.param("full", OFFLOADED, ADAFACTOR, marks=pytest.mark.ci),
        pytest.param("full", REPLICATED, {}, marks=pytest.mark.ci),
        pytest.param("qlora", REPLICATED, {}, marks=pytest.mark.ci),
        pytest.param("full", REPLICATED, states("bf16"), marks=pytest.mark.ci),
        ("lora", REPLICATED | OFFLOADED, ADAFACTOR),
    ],
)
def test_the_same_losses_as_one_process(
    world: World, tiny_base: Path, method: str, sharding: dict[str, Any], sections: dict[str, Any]
) -> None:
    """Clipped, accumulated over two micro-batches a rank, with evaluations in between."""
    cfg = fsdp2(tiny_base, method, sharding, **sections)
    trained, reference = (
        world(2).run(cells.train, cells.dump(cfg), None, 2),
        alone(world, tiny_base, method, **sections),
    )
    assert max(reference.grad_norms) > 0.5, "clipping must be active in this test"
    assert_equal_runs(trained, reference)
    np.testing.assert_allclose(trained[0].eval_losses, reference.eval_losses, rtol=1e-5)
    assert_sharded_as_described(cfg, trained)


@pytest.mark.ci
@pytest.mark.parametrize("sections", [{}, ADAFACTOR])
def test_two_replicas_of_two_shards(world: World, tiny_base: Path, sections: dict[str, Any]) -> None:
    """Each shard counts once in the norm, each replica's gradient once in the mean."""
    cfg = fsdp2(tiny_base, "full", REPLICATED, **sections)
    trained = world(4).run(cells.train, cells.dump(cfg), None, 2)
    assert_equal_runs(trained, alone(world, tiny_base, "full", **sections))
    assert_sharded_as_described(cfg, trained)
    run = resolve(cfg, WorldShape(1, 4))
    assert trained[0].local == trained[2].local
    assert trained[0].optimizer_numel + trained[1].optimizer_numel == run.model.num_trainable


def test_replicas_are_described_by_their_place_in_the_shard_group(tiny_base: Path) -> None:
    whole = resolve(cells.config(str(tiny_base), "full", "fsdp2"), WorldShape(1, 3))
    replicated = resolve(fsdp2(tiny_base, "full", REPLICATED), WorldShape(2, 3))
    for rank in range(6):
        assert registry.describe(replicated, rank).parameters == registry.describe(whole, rank % 3).parameters


def test_replicas_must_divide_the_processes(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="dp_replicate is 2, which does not divide the run's 3 processes"):
        resolve(fsdp2(tiny_base, "full", REPLICATED), WorldShape(1, 3))


def test_offloaded_states_are_not_the_devices(tiny_base: Path) -> None:
    run = resolve(fsdp2(tiny_base, "full", OFFLOADED), WorldShape(1, 2))
    planned = state_bytes(run)
    assert (planned.parameters, planned.gradients, planned.optimizer) == (run.model.buffer_bytes, 0, 0)


def what_fsdp_did(text: str) -> tuple[set[str], list[str], bool]:
    """Devices after a step, parts on the host, and whether pinned memory was asked for (it needs a GPU)."""
    _, strategy = cells.start_and_step(Config.model_validate(yaml.safe_load(text)))
    assert isinstance(strategy, Fsdp2)
    policy = strategy.model._get_fsdp_state()._fsdp_param_group.offload_policy
    devices = {tensor.device.type for _, tensor, _ in strategy.local_parameters()}
    return devices, sorted(strategy.parts_on_host()), isinstance(policy, CPUOffloadPolicy) and policy.pin_memory


def test_fsdp_did_what_was_asked(world: World, tiny_base: Path) -> None:
    parts = ["optimizer", "parameters"]
    for answer in world(2).run(what_fsdp_did, cells.dump(fsdp2(tiny_base, "full", OFFLOADED))):
        assert answer == ({"cpu"}, parts, False)
    for answer in world(2).run(what_fsdp_did, cells.dump(cells.config(str(tiny_base), "full", "fsdp2"))):
        assert answer == ({"cpu"}, [], False)


def message_of_mismatch(described: str, applied: str) -> str:
    runs = [resolve(Config.model_validate(yaml.safe_load(t)), WorldShape(1, 2)) for t in (described, applied)]
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(applied)))
    try:
        verify_sharding(strategy, registry.describe(runs[0], dist.get_rank()))
    except ShardingMismatch as e:
        return e.what
    return ""


def test_what_did_not_happen_is_found(world: World, tiny_base: Path) -> None:
    plain, offloaded, replicated = (
        cells.dump(fsdp2(tiny_base, "full", s)) for s in ({"strategy": "fsdp2"}, OFFLOADED, REPLICATED)
    )
    for message in world(2).run(message_of_mismatch, offloaded, plain):
        assert "nothing is kept in host memory, described ['optimizer', 'parameters']" in message
    for message in world(2).run(message_of_mismatch, replicated, plain):
        assert "embed_tokens.weight has (numel, dtype, requires_grad)" in message


@pytest.mark.parametrize("sharding", [OFFLOADED, pytest.param(REPLICATED, marks=pytest.mark.ci)])
def test_resumed_equals_uninterrupted(world: World, tiny_base: Path, tmp_path: Path, sharding: dict[str, Any]) -> None:
    """Bit for bit; and the checkpoint of replicas is whole and holds everything once."""
    whole = world(2).run(run_part, whole_run(tiny_base, tmp_path / "a", "full", "fsdp2", sharding=sharding), None)[0]
    text = whole_run(tiny_base, tmp_path / "b", "full", "fsdp2", sharding=sharding)
    resumed = world(2).run(run_part, text, checkpoint(tmp_path / "a"))[0]
    assert resumed.metrics == whole.metrics[STOP:]
    assert final_bytes(tmp_path / "b") == final_bytes(tmp_path / "a") != {}


def stored_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def goes_on(world: World, base: Path, tmp_path: Path, chain: list[tuple[dict[str, Any], int]]) -> None:
    reference = world(1).run(run_part, whole_run(base, tmp_path / "whole", "full", "ddp"), None)[0]
    start, sizes = None, []
    for number, (sharding, size) in enumerate(chain):
        text = whole_run(base, tmp_path / str(number), "full", "fsdp2", sharding=sharding)
        part = world(size).run(run_part, text, start)[0]
        np.testing.assert_allclose(part.metrics, reference.metrics[STOP * number :], rtol=1e-5)
        start = checkpoint(tmp_path / str(number), STOP * (number + 1))
        sizes.append(stored_bytes(checkpoint(tmp_path / str(number), 5)))
    # Headers differ by how many files there are; weights and moments do not.
    assert max(sizes) - min(sizes) < 0.1 * min(sizes)


def test_replicas_plain_shards_and_offload_go_on_with_each_other(world: World, tiny_base: Path, tmp_path: Path) -> None:
    goes_on(world, tiny_base, tmp_path, [(REPLICATED, 2), ({"strategy": "fsdp2"}, 3), (OFFLOADED, 2)])


@pytest.mark.ci
def test_two_replicas_of_two_shards_go_on_as_two_shards_and_back(world: World, tiny_base: Path, tmp_path: Path) -> None:
    goes_on(world, tiny_base, tmp_path, [(REPLICATED, 4), ({"strategy": "fsdp2"}, 2), (REPLICATED, 4)])
