"""The processes of a run as its launcher's environment describes them, and how a batch is spread over them."""

from __future__ import annotations

import math

import pytest

from sft_dist.data.batch import BatchPlan
from sft_dist.errors import ConfigError
from sft_dist.runtime.world import World, WorldShape


def environment(rank: int, size: int, local_rank: int, per_node: int | None = None) -> dict[str, str]:
    env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    return env if per_node is None else {**env, "LOCAL_WORLD_SIZE": str(per_node)}


def test_without_a_launcher_a_world_of_one() -> None:
    world = World.from_environment({"LOCAL_RANK": "0", "PATH": "x"})
    assert (world.rank, world.local_rank, world.size, world.is_main) == (0, 0, 1, True)
    assert world.shape == WorldShape(1, 1)


def test_two_nodes_of_four() -> None:
    world = World.from_environment(environment(5, 8, 1, 4))
    assert (world.rank, world.local_rank, world.size, world.is_main) == (5, 1, 8, False)
    assert world.shape == WorldShape(num_nodes=2, ranks_per_node=4)


def test_without_the_local_size_all_processes_are_on_one_node() -> None:
    assert World.from_environment(environment(2, 3, 2)).shape == WorldShape(1, 3)


def test_deepspeed_names_the_local_size_differently() -> None:
    env = environment(5, 8, 1)
    assert World.from_environment({**env, "LOCAL_SIZE": "4"}).shape == WorldShape(num_nodes=2, ranks_per_node=4)
    assert World.from_environment({**env, "LOCAL_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}).shape == WorldShape(2, 4)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_an_incomplete_environment(missing: str) -> None:
    env = environment(0, 2, 0, 2)
    del env[missing]
    with pytest.raises(ConfigError) as caught:
        World.from_environment(env)
    assert missing in caught.value.what
    assert "launch/torchrun.sh" in caught.value.fix


def test_a_value_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match="'two'"):
        World.from_environment({**environment(0, 2, 0), "WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    ("rank", "size", "local_rank", "per_node"),
    [(2, 2, 0, 2), (-1, 2, 0, 2), (0, 2, 2, 2), (0, 2, -1, 2), (0, 3, 0, 2), (0, 2, 0, 4)],
    ids=["rank too high", "rank negative", "local too high", "local negative", "uneven nodes", "more local than all"],
)
def test_an_environment_that_contradicts_itself(rank: int, size: int, local_rank: int, per_node: int) -> None:
    with pytest.raises(ConfigError, match="contradicts itself") as caught:
        World.from_environment(environment(rank, size, local_rank, per_node))
    assert f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={per_node}" in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("per_node", ["0", "-2"])
def test_a_local_size_that_is_no_size(per_node: str) -> None:
    with pytest.raises(ConfigError):
        World.from_environment({**environment(0, 2, 0), "LOCAL_WORLD_SIZE": per_node})


def test_every_rank_of_a_world_is_accepted() -> None:
    worlds = [World.from_environment(environment(r, 6, r % 3, 3)) for r in range(6)]
    assert [w.rank for w in worlds] == list(range(6))
    assert [w.is_main for w in worlds] == [True] + [False] * 5
    assert {w.shape for w in worlds} == {WorldShape(2, 3)}


def test_shapes() -> None:
    assert WorldShape().size == 1
    assert WorldShape(num_nodes=3, ranks_per_node=8).size == 24
    for bad in ((0, 1), (1, 0), (-1, 2)):
        with pytest.raises(ValueError, match="at least one process"):
            WorldShape(*bad)


# The arithmetic of batches


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "accumulation"),
    [(64, 1, 8, 8), (64, 4, 8, 2), (7, 2, 2, 2), (7, 1, 3, 3), (1, 1, 8, 1), (8, 3, 1, 3), (9, 3, 3, 1)],
)
def test_accumulation_is_derived(global_batch: int, micro_batch: int, world_size: int, accumulation: int) -> None:
    plan = BatchPlan(global_batch, micro_batch, world_size, max_seq_len=128)
    assert plan.gradient_accumulation_steps == accumulation
    assert plan.micro_batches(global_batch) == accumulation


def test_passes_suffice_and_none_is_idle_on_every_rank() -> None:
    for world_size in range(1, 7):
        for micro_batch in range(1, 5):
            plan = BatchPlan(50, micro_batch, world_size, max_seq_len=128)
            for sequences in range(1, 51):
                passes = plan.micro_batches(sequences)
                # Rank 0 is dealt most; the last pass has at least one sequence there.
                most = len(range(0, sequences, world_size))
                assert (passes - 1) * micro_batch < most <= passes * micro_batch


@pytest.mark.parametrize(("sequences", "steps"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (1000, 16)])
def test_no_sequence_of_an_epoch_is_dropped(sequences: int, steps: int) -> None:
    assert BatchPlan(64, 1, 8, max_seq_len=128).steps_per_epoch(sequences) == steps == math.ceil(sequences / 64)
