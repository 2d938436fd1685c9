"""Sequence parallelism without processes: who gets which tokens, what is refused, and what it saves in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sft_dist.data.batch import BatchPlan, MicroBatch
from sft_dist.data.loader import Part, collate, empty_micro_batch, micro_batches
from sft_dist.data.packing import Packs
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import ConfigError
from sft_dist.model.sequence_parallel import shared_kv_heads
from sft_dist.plan.activations import trace
from sft_dist.plan.choose import choose
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.activation_checkpointing import apply_activation_checkpointing
from sft_dist.sharding.sequence_parallel import sequence_group
from tests.helpers.cells import config, synthetic_data
from tests.unit.test_trace import fake_model

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def run_of(path: Path, size: int, ranks: int, strategy: str = "fsdp2", **sections: Any) -> Run:
    sharding = {"strategy": strategy, "sequence_parallel": size}
    return resolve(config(str(path), sharding=sharding, **sections), WorldShape(1, ranks))


# Who gets which tokens


def joined(parts: list[MicroBatch], field: str) -> Tensor:
    return torch.cat([getattr(part, field) for part in parts], dim=-1)


@pytest.mark.parametrize("of", [1, 2, 3, 5, 16])
def test_the_parts_are_the_micro_batch(of: int) -> None:
    data = synthetic_data()
    rows = [0, 3, 4]
    whole = collate(data, rows)
    parts = [collate(data, rows, Part(number, of)) for number in range(of)]
    assert whole.split is None
    assert whole.num_tokens == whole.input_ids.shape[1]
    for field in ("input_ids", "position_ids", "labels"):
        assert torch.equal(joined(parts, field), getattr(whole, field)), field
    sizes = tuple(part.input_ids.shape[1] for part in parts)
    assert max(sizes) - min(sizes) <= 1
    starts = [sum(sizes[:number]) for number in range(of)]
    indices = [part.supervised_index + start for part, start in zip(parts, starts, strict=True)]
    assert torch.equal(torch.cat(indices), whole.supervised_index)
    for part, size in zip(parts, sizes, strict=True):
        assert part.split == (None if of == 1 else sizes)
        assert (part.seq_lens, part.max_seq_len, part.num_tokens) == (whole.seq_lens, whole.max_seq_len, sum(sizes))
        assert torch.equal(part.cu_seqlens, whole.cu_seqlens)
        assert all(0 <= index < size for index in part.supervised_index.tolist())
        assert len(part.supervised_index) == len(part.labels) == part.num_supervised


def test_the_token_before_a_split_predicts_the_one_behind_it() -> None:
    data = synthetic_data(rows=2, packing=False)
    row = next(row for row in range(2) if data.row(row)[1][-2:].all())
    ids = data.row(row)[0]
    first, last = (collate(data, [row], Part(number, len(ids))) for number in (len(ids) - 2, len(ids) - 1))
    assert first.input_ids.tolist() == [[ids[-2]]]
    assert (first.supervised_index.tolist(), first.labels.tolist()) == ([0], [ids[-1]])
    assert last.num_supervised == 0


def test_every_rank_has_a_token() -> None:
    """Where there are fewer tokens than ranks, more are added: a segment of their own, without labels."""
    parts = [empty_micro_batch(Part(number, 3)) for number in range(3)]
    assert [(part.num_tokens, part.seq_lens, part.split, part.num_supervised) for part in parts] == [
        (3, (1, 2), (1, 1, 1), 0)
    ] * 3
    data = synthetic_data()
    row = int(data.lengths.argmin())
    whole = collate(data, [row])
    parts = [collate(data, [row], Part(number, 16)) for number in range(16)]
    assert whole.num_tokens < 16
    assert [part.input_ids.shape for part in parts] == [(1, 1)] * 16
    assert parts[0].seq_lens == (whole.num_tokens, 16 - whole.num_tokens)
    assert joined(parts, "input_ids")[:, : whole.num_tokens].equal(whole.input_ids)
    assert joined(parts, "labels").equal(whole.labels)


def test_each_group_has_its_own_sequences() -> None:
    """Six ranks in two groups of three train what two ranks would, each token on one rank."""
    data = synthetic_data()
    sequences = torch.arange(data.num_sequences).numpy()
    pair, six = BatchPlan(7, 2, 2, 48), BatchPlan(7, 2, 2, 48, sequence_parallel=3)
    for group in range(2):
        alone = list(micro_batches(data, pair, sequences, group))
        shared = [list(micro_batches(data, six, sequences, 3 * group + number)) for number in range(3)]
        assert len(alone) == len(shared[0]) > 1
        for (whole, is_last), *parts in zip(alone, *shared, strict=True):
            assert [last for _, last in parts] == [is_last] * 3
            ids = joined([part for part, _ in parts], "input_ids")
            assert torch.equal(ids[:, : whole.num_tokens], whole.input_ids), "an empty one has a token for each rank"
            assert torch.equal(joined([part for part, _ in parts], "labels"), whole.labels)


# What follows from it, and what is refused


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_states_are_those_of_all_ranks(tiny_base: Path, strategy: str) -> None:
    """Parameters are sharded over all ranks, whether these share sequences or not."""
    shared, apart = run_of(tiny_base, 4, 8, strategy), run_of(tiny_base, 1, 8, strategy)
    assert (shared.batch.world_size, apart.batch.world_size) == (2, 8)
    assert [registry.describe(shared, rank) for rank in range(8)] == [
        registry.describe(apart, rank) for rank in range(8)
    ]


def test_auto_keeps_what_was_stated(tiny_base: Path) -> None:
    cfg = config(str(tiny_base), sharding={"strategy": "auto", "sequence_parallel": 2})
    choice = choose(cfg, WorldShape(1, 4), memory_bytes=2**40)
    assert choice.config.sharding.sequence_parallel == 2
    assert resolve(choice.config, WorldShape(1, 4)).batch.world_size == 2


@pytest.mark.parametrize(
    ("size", "ranks", "reason"),
    [
        (
            2,
            3,
            "2 does not divide the run's 3 processes\n  fix: set sharding.sequence_parallel to 1 or 3, or run on a m",
        ),
        (
            4,
            1,
            "4 does not divide the run's one process\n  fix: set sharding.sequence_parallel to 1, or run on a multiple",
        ),
        (3, 3, "sequence_parallel 3 does not divide the 4 attention heads [^\n]*\n[^\n]*parallel to 1, 2 or 4"),
        (8, 8, "sequence_parallel 8 does not divide the 4 attention heads"),
    ],
)
def test_what_does_not_divide_is_refused(tiny_base: Path, size: int, ranks: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run_of(tiny_base, size, ranks)


@pytest.mark.parametrize(
    ("kv_heads", "size", "shared"), [(8, 2, 8), (8, 8, 8), (8, 16, 16), (2, 4, 4), (1, 4, 4), (6, 4, 12), (3, 2, 6)]
)
def test_key_and_value_heads_are_repeated_as_little_as_needed(kv_heads: int, size: int, shared: int) -> None:
    assert shared_kv_heads(kv_heads, size) == shared


# On tensors without values


@pytest.fixture
def fake_group_of_four() -> Iterator[None]:
    with group_of_four():
        yield


@contextmanager
def group_of_four() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_part_runs_on_fake_tensors(tiny_base: Path, fake_group_of_four: None, checkpointing: str) -> None:
    run = run_of(tiny_base, 4, 4, activation_checkpointing={"mode": checkpointing})
    data = synthetic_data(rows=3)
    group = sequence_group(run)
    with FakeTensorMode():
        model = fake_model(run)
        model.sequence_group = group
        apply_activation_checkpointing(model, run.activation_checkpointing)
        for batch in (collate(data, [0, 1, 2], Part(0, 4)), empty_micro_batch(Part(0, 4))):
            model(batch).backward()
    assert all(p.grad is not None for p in model.parameters())


LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def kept_by_autograd(run: Run, length: int) -> int:
    """Bytes that forward keeps for backward of one row; what is there anyway is not among them."""
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        model = fake_model(run)
        model.sequence_group = sequence_group(run)
        batch = collate(one_row(length), [0], Part(0, run.batch.sequence_parallel))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(batch)
        for tensor in (*model.parameters(), *model.buffers(), *vars(batch).values()):
            if isinstance(tensor, Tensor):
                storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


def one_row(length: int) -> PreparedData:
    """Every token is trained on."""
    return PreparedData.of([(np.arange(length) % 1000, np.ones(length, dtype=bool))], Packs.single(1))


def test_activations_are_shared_as_planned(tmp_path: Path) -> None:
    """Four ranks keep a quarter each, attention's output once more, and two key and value heads as four."""
    sections = {"data": {"train": [{"path": "unused"}], "max_seq_len": 4096}, "precision": {"compute": "bf16"}}
    train = {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": 1}
    none = {"activation_checkpointing": {"mode": "none"}}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": 3}))
    runs = {size: run_of(tmp_path, size, 4, **sections, **none, train=train) for size in (1, 4)}
    # The first of a row's tokens has no label.
    tapes = {size: trace(run, supervised=4095) for size, run in runs.items()}
    assert not dist.is_initialized()
    with group_of_four():
        for size, run in runs.items():
            assert kept_by_autograd(run, 4096) == tapes[size].kept_bytes
    # Of a layer that is neither the first nor the last.
    shared, alone = tapes[4].saved_bytes[1], tapes[1].saved_bytes[1]
    assert shared - alone / 4 == 1024 * 128 * 2 * (32 + 2 * 2)
