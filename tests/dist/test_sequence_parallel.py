"""Ranks that share the tokens of a micro-batch train what one rank trains, and each of them holds its part alone.

Equal losses prove nothing: a group whose ranks all compute everything has them too, divided by chance or not. So what
attention and the embedding saw is compared as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sft_dist.checkpoint.artefact import take_probes
from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder, micro_batches
from sft_dist.model import attention
from sft_dist.model.sequence_parallel import AllToAll, SequenceParallel
from sft_dist.train.step import train_step
from tests.dist import test_resume
from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.pool import WorldPool
from tests.unit.test_trace import watched as watched_for_waits

World = Callable[[int], WorldPool]

TOLERANCE = 1e-5

# Three sequences for two groups: one of them has nothing in the last pass.
THREE = {"global_batch_size": 3, "micro_batch_size": 1, "max_steps": 4, "seed": 3}
SGD = {"type": "sgd", "lr": 0.3, "momentum": 0.9, "max_grad_norm": 0.5, "warmup_ratio": 0.2}


def sharing(base: Path, method: str, strategy: str, size: int, **sections: dict[str, Any]) -> Config:
    sharding = {"strategy": strategy, "sequence_parallel": size}
    return cells.config(str(base), method, sharding=sharding, **sections)


@pytest.fixture(scope="module")
def alone(world: World) -> Callable[..., Trained]:
    """``alone(config)``: the same run in one process, trained once for all cells that compare with it."""

    @cache
    def train(text: str, *args: Any) -> Trained:
        return world(1).run(cells.train, text, *args)[0]

    return lambda cfg, *args: train(cells.dump(cfg), *args)


@pytest.mark.parametrize(
    ("strategy", "method", "ranks", "size", "checkpointing"),
    [
        ("fsdp2", "full", 2, 2, "full"),
        ("fsdp2", "qlora", 2, 2, "none"),
        ("zero3", "qlora", 2, 2, "full"),
        pytest.param("zero3", "full", 4, 2, "none", marks=pytest.mark.ci),
        ("zero2", "lora", 2, 2, "none"),
        ("ddp", "lora", 2, 2, "full"),
        # Two groups; and a group of all four, among whom the two key and value heads are repeated.
        ("fsdp2", "lora", 4, 2, "full"),
        ("ddp", "full", 4, 4, "none"),
        *(
            pytest.param(strategy, method, 4, size, "full", marks=pytest.mark.full)
            for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
            for method in ("full", "lora", "qlora")
            for size in (2, 4)
        ),
    ],
)
def test_sharing_sequences_changes_nothing(
    world: World,
    alone: Callable[..., Trained],
    tiny_base: Path,
    strategy: str,
    method: str,
    ranks: int,
    size: int,
    checkpointing: str,
) -> None:
    """Losses, norms, evaluation, and under plain SGD the weights."""
    sections: dict[str, Any] = {"optim": SGD, "train": THREE, "activation_checkpointing": {"mode": checkpointing}}
    cfg = sharing(tiny_base, method, strategy, size, **sections)
    reference = alone(cells.config(str(tiny_base), method, **sections), None, 2)
    trained = world(ranks).run(cells.train, cells.dump(cfg), None, 2)
    assert max(reference.grad_norms) > 0.5, "clipping must be active in this test"
    assert abs(reference.eval_losses[1] - reference.eval_losses[0]) > 100 * TOLERANCE, "the weights must move"
    for rank in trained:
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=TOLERANCE)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=TOLERANCE)
        np.testing.assert_allclose(rank.eval_losses, reference.eval_losses, rtol=TOLERANCE)
    assert trained[0].weights.keys() == reference.weights.keys() != set()
    for name, weight in reference.weights.items():
        np.testing.assert_allclose(trained[0].weights[name], weight, rtol=TOLERANCE, atol=1e-6, err_msg=name)


# What each rank saw


@dataclass
class Seen:
    """Of one rank, in the micro-batches of a step.

    Args:
        expected: tokens of each micro-batch, and the bounds of its segments.
        embedded: tokens that the embedding saw.
        attended: (tokens, heads, kv_heads) of each call of attention.
        exchanged: (rows sent, rows received) of each all-to-all.
    """

    expected: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    embedded: list[int] = field(default_factory=list)
    attended: list[tuple[int, int, int]] = field(default_factory=list)
    exchanged: list[tuple[int, int]] = field(default_factory=list)
    supervised: int = 0


def watch(text: str) -> tuple[Seen, list[tuple[list[int], Tensor]]]:
    """A step's traffic, another one in which the host must not wait, and then the probes of the artefact."""
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    data, rank = cells.synthetic_data(), dist.get_rank()
    step = TrainingOrder(data, run.batch, run.seed).step(0)
    seen = Seen()
    for batch, _ in micro_batches(data, run.batch, step.sequences, rank):
        seen.expected.append((batch.num_tokens, tuple(accumulate(batch.seq_lens))))
        seen.supervised += batch.num_supervised
    packed, exchange = attention.packed_attention, dist.all_to_all_single

    def watched(query: Tensor, key: Tensor, *rest: Any) -> Any:
        seen.attended.append((query.shape[0], query.shape[1], key.shape[1]))
        return packed(query, key, *rest)

    def heard(output: Tensor, rows: Tensor, *rest: Any, group: Any) -> Any:
        assert dist.get_world_size(group) == run.sharding.sequence_parallel
        seen.exchanged.append((rows.shape[0], output.shape[0]))
        return exchange(output, rows, *rest, group=group)

    embedding = strategy.model.causal_lm.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    hook = embedding.register_forward_pre_hook(lambda _, args: seen.embedded.append(args[0].shape[1]))
    try:
        with patch.object(attention, "packed_attention", watched), patch.object(dist, "all_to_all_single", heard):
            train_step(strategy, data, run.batch, step, rank=rank, device=cells.CPU, lr=1e-3)
        hook.remove()
        following = TrainingOrder(data, run.batch, run.seed).step(1)
        watched_for_waits(
            lambda: train_step(strategy, data, run.batch, following, rank=rank, device=cells.CPU, lr=1e-3)
        )
        probes = [(probe.positions, probe.logits) for probe in take_probes(strategy, data, cells.CPU)]
        return seen, probes
    finally:
        strategy.close()


@pytest.mark.parametrize(("strategy", "ranks", "size"), [("fsdp2", 2, 2), ("fsdp2", 4, 2), ("ddp", 4, 4)])
def test_each_rank_holds_its_tokens_and_attends_its_heads(
    world: World, tiny_base: Path, strategy: str, ranks: int, size: int
) -> None:
    cfg = sharing(tiny_base, "full", strategy, size, train=THREE, activation_checkpointing={"mode": "none"})
    results = world(ranks).run(watch, cells.dump(cfg))
    layers, heads, kv_heads = 2, 4, max(2, size)
    crossing, uneven, empty = 0, 0, 0
    for first in range(0, ranks, size):
        group: list[Seen] = [seen for seen, _ in results[first : first + size]]
        for number, (tokens, bounds) in enumerate(group[0].expected):
            parts = [seen.embedded[number] for seen in group]
            assert sum(parts) == tokens
            assert max(parts) - min(parts) <= 1
            crossing += parts[0] not in bounds
            uneven += parts[0] != parts[-1]
            empty += bounds == (1, size)
            for seen in group:
                calls = seen.attended[layers * number : layers * (number + 1)]
                assert calls == [(tokens, heads // size, kv_heads // size)] * layers
        for rank, seen in enumerate(group):
            there = [(size * part, tokens) for part, (tokens, _) in zip(seen.embedded, seen.expected, strict=True)]
            back = [(tokens, rows) for rows, tokens in there]
            # Forward there and back, backward back and there, in every layer.
            assert sorted(seen.exchanged) == sorted(2 * layers * (there + back)), rank
    assert crossing
    assert uneven
    assert bool(empty) == (ranks > size), "three sequences for two groups"
    order = TrainingOrder(cells.synthetic_data(), cfg_plan(cfg, ranks), 3)
    assert sum(seen.supervised for seen, _ in results) == order.step(0).supervised_tokens


def cfg_plan(cfg: Config, ranks: int) -> Any:
    from sft_dist.resolve import resolve
    from sft_dist.runtime.world import WorldShape

    return resolve(cfg, WorldShape(1, ranks)).batch


def test_probes_are_whole_and_in_order(world: World, tiny_base: Path) -> None:
    """The proof of the artefact asks every rank for the same rows."""
    cfg = sharing(tiny_base, "full", "fsdp2", 2, train=THREE)
    (_, expected), *_ = world(1).run(watch, cells.dump(cells.config(str(tiny_base), train=THREE)))
    for _, probes in world(2).run(watch, cells.dump(cfg)):
        assert [positions for positions, _ in probes] == [positions for positions, _ in expected]
        for (_, logits), (_, reference) in zip(probes, expected, strict=True):
            torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)


# Attention alone


def attend_shared() -> list[tuple[str, float]]:
    """Largest difference of output and gradients from attention over all tokens, relative, for each case."""
    size, rank = dist.get_world_size(), dist.get_rank()
    results = []
    for heads, kv_heads, seq_lens, window, reentrant in (
        (6, 6, (4, 9, 1), None, None),
        (6, 2, (4, 9, 1), None, True),
        (6, 3, (4, 9, 1), 3, None),
        (6, 1, (14,), 5, False),
        (12, 2, (7, 8), None, True),
        (6, 2, (1,), None, None),
        (6, 2, (2,), 1, False),
    ):
        tokens = sum(seq_lens)
        generator = torch.Generator().manual_seed(tokens)
        drawn = [torch.randn(1, n, tokens, 8, generator=generator) for n in (heads, kv_heads, kv_heads)]
        upstream = torch.randn(1, tokens, heads, 8, generator=generator)
        split = tuple(tokens // size + (number < tokens % size) for number in range(size))
        mine = slice(sum(split[:rank]), sum(split[: rank + 1]))

        def attend(q: Tensor, k: Tensor, v: Tensor, shared: SequenceParallel | None, bounds: Any = seq_lens) -> Tensor:
            out, _ = attention.packed_attention_forward(
                nn.Identity(), q, k, v, None, seq_lens=bounds, max_seq_len=max(bounds), cu_seqlens=torch.zeros(0),
                sequence_parallel=shared, sliding_window=window,  # noqa: B023  called in this pass of the loop
            )  # fmt: skip
            return out

        whole = [t.clone().requires_grad_() for t in drawn]
        reference = attend(*whole, None)
        expected = [reference, *torch.autograd.grad(reference, whole, upstream)]
        local = [t[:, :, mine].clone().requires_grad_() for t in drawn]
        sharers = SequenceParallel(dist.group.WORLD, split)  # type: ignore[arg-type]
        if reentrant is None:
            out = attend(*local, sharers)
        else:
            out = checkpoint(attend, *local, sharers, use_reentrant=reentrant)
        out.backward(upstream[:, mine])
        got = [out, *(t.grad for t in local)]
        wanted = [expected[0][:, mine], *(t[:, :, mine] for t in expected[1:])]
        worst = max(
            (float((g - w).detach().abs().max()) for g, w in zip(got, wanted, strict=True) if w.numel()), default=0.0
        )
        shapes = [tuple(g.shape) == tuple(w.shape) for g, w in zip(got, wanted, strict=True)]
        results.append((f"{heads}/{kv_heads} {seq_lens} {window} {reentrant}", worst if all(shapes) else float("inf")))
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_attention_over_shared_tokens(world: World, size: int) -> None:
    """Heads repeated or not, windows, uneven parts, ranks without a token, recomputed either way."""
    for results in world(size).run(attend_shared):
        assert len(results) == 7
        for case, difference in results:
            assert difference < 1e-5, case


def exchange_there_and_back() -> bool:
    """Whether backward brings each row's gradient to the rank that sent the row."""
    rank, size = dist.get_rank(), dist.get_world_size()
    send, receive = tuple(range(rank, rank + size)), tuple(other + rank for other in range(size))
    rows = torch.arange(float(sum(send))).add(100 * rank).unsqueeze(1).requires_grad_()
    received = AllToAll.apply(rows, send, receive, dist.group.WORLD)
    (received * received.detach()).sum().backward()
    assert rows.grad is not None
    return torch.equal(rows.grad, rows.detach()) and received.shape == (sum(receive), 1)


def test_gradients_return_to_the_rows(world: World) -> None:
    assert world(3).run(exchange_there_and_back) == [True] * 3


# Through the run's own loop


def test_a_checkpoint_goes_on_without_sharing(world: World, tiny_base: Path, tmp_path: Path) -> None:
    """Sharing changes nothing that is learned, so a run may go on with another value; each token is counted once."""
    whole = test_resume.config(
        tiny_base, tmp_path / "shared", "lora", "fsdp2", sharding={"strategy": "fsdp2", "sequence_parallel": 2}
    )
    resumed = test_resume.config(tiny_base, tmp_path / "resumed", "lora", "ddp")
    expected = world(2).run(test_resume.run_part, whole, None)[0].metrics
    start = test_resume.checkpoint(tmp_path / "shared")
    got = world(2).run(test_resume.run_part, resumed, start)[0].metrics
    assert len(expected) == test_resume.STEPS
    np.testing.assert_allclose(got, expected[test_resume.STOP :], rtol=TOLERANCE)
    counted = [
        [(line["step"], line["num_tokens"], line["supervised_tokens"]) for line in test_resume.metrics(tmp_path / name)]
        for name in ("shared", "resumed")
    ]
    assert counted[0][test_resume.STOP :] == counted[1]
    identities = [
        json.loads(path.read_text())["identity"] for path in sorted(tmp_path.glob("*/checkpoints/*/manifest.json"))
    ]
    assert len(identities) > 2
    assert all(identity == identities[0] for identity in identities)
