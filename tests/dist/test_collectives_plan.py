"""The collectives that a plan reckons with are those that two processes hear: kind, bytes, and when."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from sft_dist.config.schema import Config, Fsdp2Sharding
from sft_dist.data.loader import collate, micro_batches
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding.collectives import (
    Collective,
    blocks_with_backward,
    collectives,
    ddp_buckets,
    of_evaluation,
    total_bytes,
)
from tests.helpers import cells
from tests.helpers.listening import Heard, Listening
from tests.helpers.pool import WorldPool
from tests.helpers.tiny_model import build_base

World = Callable[[int], WorldPool]


def listen(text: str) -> tuple[list[Heard], list[int]]:
    """What is heard in both micro-batches of a step and in its update, and tokens of the micro-batches; the third step,
    because DDP makes its buckets in the first one and DeepSpeed prefetches from the second on."""
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    data = cells.synthetic_data(rows=8, packing=False)
    sequences = list(range(2 * run.batch.world_size))
    try:
        for _ in range(3):
            heard, tokens = [], []
            for batch, is_last in micro_batches(data, run.batch, sequences, dist.get_rank()):
                with Listening() as listening:
                    strategy.forward_backward(batch, supervised_in_step=20, is_last_micro_batch=is_last)
                heard.append(listening.heard)
                tokens.append(batch.num_tokens)
            with Listening() as listening:
                strategy.step(1e-3)
            heard.append(listening.heard)
        return heard, tokens
    finally:
        strategy.close()


def listen_to_evaluation(text: str) -> Heard:
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    try:
        with Listening() as listening:
            strategy.evaluate(collate(cells.synthetic_data(rows=2, packing=False), [dist.get_rank()]))
        return listening.heard
    finally:
        strategy.close()


def counted(found: tuple[Collective, ...] | list[Collective]) -> Heard:
    return Counter((c.kind, c.size_bytes) for c in found)


def described(run: Run, tokens: list[int]) -> list[Heard]:
    first, last = (collectives(run, tokens=n) for n in tokens)
    return [
        counted([c for c in first if c.every in ("micro_batch", "first_micro_batch")]),
        counted([c for c in last if c.every in ("micro_batch", "last_micro_batch")]),
        counted([c for c in last if c.every == "step"]),
    ]


def cell(base: Path, method: str | dict[str, Any], strategy: str, **sections: Any) -> tuple[Run, Config]:
    cfg = cells.config(str(base), method, strategy, **{"train": {"micro_batch_size": 1}, **sections})
    return resolve(cfg, WorldShape(1, 2)), cfg


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("four"), num_layers=4, hidden_size=40)


@pytest.mark.parametrize(
    ("method", "strategy", "precision", "sharding"),
    [
        ("full", "ddp", {"compute": "bf16"}, {}),
        ("lora", "ddp", {"compute": "bf16", "reduce": "bf16"}, {}),
        ("full", "fsdp2", {"compute": "bf16"}, {}),
        ("full", "fsdp2", {"compute": "bf16", "reduce": "bf16"}, {"reshard_after_forward": False}),
        ("full", "fsdp2", {"compute": "bf16"}, {"dp_replicate": 2}),
        ("full", "fsdp2", {"compute": "bf16"}, {"reduce_once_a_step": True}),
        ("lora", "fsdp2", {"compute": "fp32"}, {"reduce_once_a_step": True, "dp_replicate": 2}),
        ("lora", "fsdp2", {"compute": "bf16"}, {}),
        ("qlora", "fsdp2", {"compute": "bf16"}, {}),
        ("prefix", "fsdp2", {"compute": "fp32"}, {}),
        ("full", "zero1", {"compute": "bf16"}, {}),
        ("lora", "zero1", {"compute": "fp32"}, {}),
        ("full", "zero2", {"compute": "bf16", "reduce": "bf16"}, {}),
        ("lora", "zero2", {"compute": "bf16"}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_is_as_described(
    world: World, tiny_base: Path, method: str, strategy: str, precision: dict[str, str], sharding: dict[str, Any]
) -> None:
    run, cfg = cell(tiny_base, method, strategy, precision=precision, sharding={"strategy": strategy, **sharding})
    first, second = world(2).run(listen, cells.dump(cfg))
    assert first[0] == second[0]
    heard, tokens = first
    assert heard == described(run, tokens)


def test_frozen_first_layers_are_gathered_once(world: World, four_layers: Path) -> None:
    """But for the one that FSDP2 fetches ahead of need."""
    method = {"type": "full", "freeze": ["embed_tokens", "layers.0", "layers.1"]}
    run, cfg = cell(four_layers, method, "fsdp2")
    assert blocks_with_backward(run) == range(2, 4)
    (heard, tokens), _ = world(2).run(listen, cells.dump(cfg))
    assert heard == described(run, tokens)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_shared_sequences_are_exchanged(world: World, tiny_base: Path, mode: str, strategy: str) -> None:
    run, cfg = cell(
        tiny_base, "lora", strategy, precision={"compute": "bf16"}, activation_checkpointing={"mode": mode},
        sharding={"strategy": strategy, "sequence_parallel": 2},
    )  # fmt: skip
    for heard, tokens in world(2).run(listen, cells.dump(cfg)):
        for mine, plan in zip(heard, described(run, tokens), strict=True):
            # Tokens that two do not divide are one more on the first rank: the plan is that rank's.
            exchanged = [size for (kind, size), times in mine.items() if kind == "all_to_all" for _ in range(times)]
            planned = [size for (kind, size), times in plan.items() if kind == "all_to_all" for _ in range(times)]
            assert sorted(exchanged) == pytest.approx(sorted(planned), rel=0.05)
            assert {k: n for k, n in mine.items() if k[0] != "all_to_all"} == {
                k: n for k, n in plan.items() if k[0] != "all_to_all"
            }


def bytes_by_kind(entries: Heard) -> dict[str, int]:
    total: Counter[str] = Counter()
    for (kind, size), times in entries.items():
        total[kind] += size * times
    return dict(total)


@pytest.mark.parametrize(
    ("strategy", "method"), [("zero2", "lora"), ("zero3", "full")], ids=["zero2 in buckets", "zero3 where all trains"]
)
def test_bytes_that_deepspeed_cuts_its_own_way(world: World, tiny_base: Path, strategy: str, method: str) -> None:
    """The order of gradients inside a block is autograd's, and stage 3 fetches ahead by elements, not by block."""
    knobs = {"deepspeed_config": {"zero_optimization": {"reduce_bucket_size": 4000}}} if strategy == "zero2" else {}
    run, cfg = cell(
        tiny_base, method, strategy, precision={"compute": "bf16"}, sharding={"strategy": strategy, **knobs}
    )
    (heard, tokens), _ = world(2).run(listen, cells.dump(cfg))
    for mine, plan in zip(heard, described(run, tokens), strict=True):
        assert bytes_by_kind(mine) == bytes_by_kind(plan)
        if strategy == "zero2":
            assert sum(mine.values()) == sum(plan.values())


def test_zero3_gathers_no_more_than_described(world: World, tiny_base: Path) -> None:
    """What is frozen is gathered again in backward, by DeepSpeed a parameter at a time and not all of it."""
    run, cfg = cell(tiny_base, "lora", "zero3", precision={"compute": "bf16"})
    (heard, _), _ = world(2).run(listen, cells.dump(cfg))
    plan = collectives(run)

    def gathered(entries: Heard) -> int:
        return sum(size * times for (kind, size), times in entries.items() if kind == "all_gather")

    once = gathered(counted([c for c in plan if c.of == "forward"]))
    for micro_batch in heard[:2]:
        assert once < gathered(micro_batch) <= gathered(counted(plan)) <= 2 * once
        reduced = counted([c for c in plan if c.kind == "reduce_scatter"])
        assert {k: n for k, n in micro_batch.items() if k[0] == "reduce_scatter"} == reduced


def test_an_evaluation_gathers_once(world: World, tiny_base: Path) -> None:
    run, cfg = cell(tiny_base, "lora", "fsdp2")
    assert world(2).run(listen_to_evaluation, cells.dump(cfg))[0] == counted(of_evaluation(collectives(run)))


def test_one_process_talks_to_nobody(tiny_base: Path) -> None:
    cfg = cells.config(str(tiny_base), "full", "fsdp2")
    assert collectives(resolve(cfg, WorldShape())) == ()


def test_buckets_are_those_of_ddp() -> None:
    sizes = [300, 400_000, 900_000, 20_000_000, 7_000_000, 3_000_000, 40_000_000, 128, 12_000_000]
    tensors = [torch.empty(n // 4, device="meta") for n in sizes]
    theirs, _ = dist._compute_bucket_assignment_by_size(tensors, [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20])
    assert ddp_buckets(sizes) == theirs


@pytest.mark.parametrize(("nodes", "per_node", "replicas"), [(1, 8, 1), (2, 8, 1), (2, 8, 2), (2, 8, 4), (4, 2, 2)])
def test_groups_cross_nodes_where_they_must(tiny_base: Path, nodes: int, per_node: int, replicas: int) -> None:
    cfg = cells.config(str(tiny_base), "full", "fsdp2", sharding={"strategy": "fsdp2", "dp_replicate": replicas})
    found = collectives(resolve(cfg, WorldShape(nodes, per_node)))
    ranks = range(nodes * per_node)
    shards = len(ranks) // replicas
    for kind, group in (("shard", list(ranks)[:shards]), ("replica", list(ranks)[::shards])):
        mine = {c.group for c in found if c.group.kind == kind}
        if len(group) > 1:
            assert {(g.size, g.crosses_nodes) for g in mine} == {(len(group), len({r // per_node for r in group}) > 1)}
            assert {g.per_node for g in mine} == {math.ceil(len(group) / len({r // per_node for r in group}))}


def test_what_a_rank_sends(tiny_base: Path) -> None:
    """DDP sends 2 (W - 1) / W of the gradients; FSDP2 a micro-batch's gradients, and weights of blocks twice."""
    ddp = resolve(cells.config(str(tiny_base), "full", "ddp"), WorldShape(1, 4))
    numel = ddp.model.num_trainable
    assert total_bytes(collectives(ddp), micro_batches=5) == 2 * 3 / 4 * numel * 4
    fsdp2 = resolve(cells.config(str(tiny_base), "full", "fsdp2"), WorldShape(1, 4))
    root = sum(p.numel for p in fsdp2.model.parameters if p.block is None)
    expected = 3 / 4 * (5 * (2 * (numel - root) + numel) + root) * 4
    assert total_bytes(collectives(fsdp2), micro_batches=5) == pytest.approx(expected, rel=0.01)
    kept = replace(fsdp2, sharding=Fsdp2Sharding(reshard_after_forward=False))
    assert total_bytes(collectives(kept), micro_batches=5) == pytest.approx(3 / 4 * 6 * numel * 4, rel=0.01)
    least = replace(fsdp2, sharding=Fsdp2Sharding(reshard_after_forward=False, reduce_once_a_step=True))
    assert total_bytes(collectives(least), micro_batches=5) == pytest.approx(3 / 4 * 2 * numel * 4, rel=0.01)
