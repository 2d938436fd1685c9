"""Which rows a step trains, on which rank, and what a micro-batch holds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.batch import BatchPlan, MicroBatch
from sft_dist.data.loader import TrainingOrder, collate, empty_micro_batch, micro_batches
from sft_dist.data.prepared import PreparedData
from tests.helpers.cells import synthetic_data

GLOBAL_BATCH = 7
WORLDS = (1, 2, 3, 5)
MICRO_BATCHES = (1, 2, 3)


def plan(*, world_size: int = 1, micro_batch_size: int = 1, global_batch_size: int = GLOBAL_BATCH) -> BatchPlan:
    return BatchPlan(global_batch_size, micro_batch_size, world_size, max_seq_len=48)


def hand_made(rows: list[tuple[list[int], list[int]]]) -> PreparedData:
    """Rows of (input ids, mask), each a sequence of its own."""
    return PreparedData.of(rows)


def segments(batch: MicroBatch) -> list[tuple[int, ...]]:
    """The input ids of each segment, cut by the bounds that attention reads."""
    ids = batch.input_ids[0].tolist()
    return [tuple(ids[a:b]) for a, b in pairwise(batch.cu_seqlens.tolist())]


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_ranks_share_each_step_exactly(world_size: int, micro_batch_size: int) -> None:
    data = synthetic_data()
    batch_plan = plan(world_size=world_size, micro_batch_size=micro_batch_size)
    order = TrainingOrder(data, batch_plan, seed=3)
    assert data.num_sequences % GLOBAL_BATCH, "the last batch must be a partial one"
    for number in range(order.steps_per_epoch):
        step = order.step(number)
        ranks = [list(micro_batches(data, batch_plan, step.sequences, rank)) for rank in range(world_size)]

        expected = [tuple(data.row(row)[0].tolist()) for sequence in step.sequences for row in data.packs[sequence]]
        real = [batch for batches in ranks for batch, _ in batches if batch.num_tokens > 1]
        assert sorted(s for batch in real for s in segments(batch)) == sorted(expected)

        passes = math.ceil(math.ceil(len(step.sequences) / world_size) / micro_batch_size)
        assert [len(batches) for batches in ranks] == [passes] * world_size
        assert all([is_last for _, is_last in batches] == [False] * (passes - 1) + [True] for batches in ranks)

        everything = [batch for batches in ranks for batch, _ in batches]
        assert step.supervised_tokens == sum(batch.num_supervised for batch in everything)
        assert step.num_tokens == sum(batch.num_tokens for batch in real)


@pytest.mark.parametrize("world_size", WORLDS)
def test_no_forward_pass_holds_more_than_a_micro_batch(world_size: int) -> None:
    data = synthetic_data(packing=False)
    batch_plan = plan(world_size=world_size, micro_batch_size=2)
    sizes = [
        len(batch.seq_lens)
        for rank in range(world_size)
        for batch, _ in micro_batches(data, batch_plan, np.arange(GLOBAL_BATCH), rank)
    ]
    assert max(sizes) <= 2


def test_a_rank_that_runs_short_runs_empty_passes() -> None:
    data = synthetic_data(packing=False)
    batch_plan = plan(world_size=3, micro_batch_size=1)
    # 4 sequences on 3 ranks: rank 0 has two, the others one and an empty pass.
    labels = [
        [batch.num_supervised for batch, _ in micro_batches(data, batch_plan, np.arange(4), rank)] for rank in range(3)
    ]
    counts = data.num_supervised[:4].tolist()
    assert labels == [[counts[0], counts[3]], [counts[1], 0], [counts[2], 0]]


def test_an_empty_micro_batch_has_a_token_and_no_label() -> None:
    batch = empty_micro_batch()
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 1)
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.seq_lens, batch.num_tokens, batch.max_seq_len) == ((1,), 1, 1)
    assert (batch.num_supervised, batch.supervised_index.shape, batch.labels.shape) == (0, (0,), (0,))


def test_sequences_are_dealt_round_robin() -> None:
    data = hand_made([([10 * r, 10 * r + 1], [0, 1]) for r in range(7)])
    first = [
        [
            s[0] // 10
            for batch, _ in micro_batches(data, plan(world_size=2), np.arange(7), rank)
            for s in segments(batch)
        ]
        for rank in range(2)
    ]
    assert first == [[0, 2, 4, 6], [1, 3, 5, 0]]  # the last 0 is the empty pass


# Order


def test_an_epoch_is_a_permutation_and_the_last_batch_is_trained_too() -> None:
    data = synthetic_data(packing=False)
    order = TrainingOrder(data, plan(), seed=3)
    assert order.steps_per_epoch == math.ceil(40 / GLOBAL_BATCH) == 6
    for epoch in range(3):
        steps = [order.step(epoch * 6 + position) for position in range(6)]
        assert {step.epoch for step in steps} == {epoch}
        assert [len(step.sequences) for step in steps] == [7, 7, 7, 7, 7, 5]
        assert sorted(np.concatenate([step.sequences for step in steps]).tolist()) == list(range(40))


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    data = synthetic_data(packing=False)
    orders = {
        tuple(np.concatenate([TrainingOrder(data, plan(), seed).step(e * 6 + p).sequences for p in range(6)]).tolist())
        for seed in (3, 4)
        for epoch in range(3)
        for e in [epoch]
    }
    assert len(orders) == 6
    assert tuple(range(40)) not in orders


def test_the_order_knows_neither_world_nor_micro_batch() -> None:
    data = synthetic_data()
    one = TrainingOrder(data, plan(), seed=3)
    for world_size in WORLDS:
        other = TrainingOrder(data, plan(world_size=world_size, micro_batch_size=2), seed=3)
        assert other.steps_per_epoch == one.steps_per_epoch
        for number in range(2 * one.steps_per_epoch):
            np.testing.assert_array_equal(other.step(number).sequences, one.step(number).sequences)


def test_the_position_of_a_run_is_its_step_number() -> None:
    data = synthetic_data()
    through = TrainingOrder(data, plan(), seed=3)
    steps = [through.step(number) for number in range(3 * through.steps_per_epoch)]
    for start in (1, 5, len(steps) - 1):
        step = TrainingOrder(data, plan(), seed=3).step(start)
        np.testing.assert_array_equal(step.sequences, steps[start].sequences)
        assert (step.epoch, step.num_tokens, step.supervised_tokens) == (
            steps[start].epoch, steps[start].num_tokens, steps[start].supervised_tokens,
        )  # fmt: skip


def test_counts_are_those_of_the_steps_own_sequences() -> None:
    data = synthetic_data()
    step = TrainingOrder(data, plan(), seed=3).step(2)
    rows = [data.row(row) for sequence in step.sequences for row in data.packs[sequence]]
    assert step.num_tokens == sum(len(ids) for ids, _ in rows)
    assert step.supervised_tokens == sum(int(mask[1:].sum()) for _, mask in rows)


# Collation


def test_collation_by_hand() -> None:
    data = hand_made([([5, 6, 7], [0, 1, 1]), ([8, 9], [1, 0]), ([11, 12, 13], [1, 0, 1])])
    batch = collate(data, [0, 1, 2])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.seq_lens == (3, 2, 3)
    assert (batch.num_tokens, batch.max_seq_len, batch.num_supervised) == (8, 3, 3)
    # 5 -> 6, 6 -> 7 and 12 -> 13. Never 7 -> 8 or 9 -> 11: first tokens are supervised there, but nothing predicts them.
    assert batch.supervised_index.tolist() == [0, 1, 6]
    assert batch.labels.tolist() == [6, 7, 13]
    dtypes = {f: getattr(batch, f).dtype for f in ("input_ids", "position_ids", "supervised_index", "labels")}
    assert set(dtypes.values()) == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32


def test_labels_are_the_next_tokens_of_the_same_row() -> None:
    data = synthetic_data(seed=8)
    rows = list(range(data.num_rows))
    expected_index, expected_labels, start = [], [], 0
    for row in rows:
        ids, mask = (part.tolist() for part in data.row(row))
        for t in range(1, len(ids)):
            if mask[t]:
                expected_index.append(start + t - 1)
                expected_labels.append(ids[t])
        start += len(ids)
    batch = collate(data, rows)
    assert batch.supervised_index.tolist() == expected_index
    assert batch.labels.tolist() == expected_labels
    assert batch.num_supervised == int(data.num_supervised.sum())


def test_collation_keeps_the_order_of_the_rows() -> None:
    data = hand_made([([5, 6], [0, 1]), ([7, 8, 9], [0, 0, 1])])
    assert segments(collate(data, [1, 0])) == [(7, 8, 9), (5, 6)]


def test_rows_without_any_label_make_an_ordinary_batch() -> None:
    batch = collate(hand_made([([5, 6, 7], [1, 0, 0]), ([4], [1])]), [0, 1])
    assert batch.labels.shape == batch.supervised_index.shape == (0,)
    assert batch.labels.dtype == batch.supervised_index.dtype == torch.int64
    assert batch.seq_lens == (3, 1)


def test_a_batch_on_its_own_device_is_not_copied() -> None:
    batch = collate(synthetic_data(), [0])
    assert batch.to(torch.device("cpu")) is batch


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    global_batch=st.integers(1, 17),
    micro_batch=st.integers(1, 5),
    epochs=st.integers(1, 3),
    parts=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4),
    seed=st.integers(0, 3),
)
def test_however_a_run_is_stopped_and_on_whatever_world_it_goes_on_its_order_stays(
    rows: int, global_batch: int, micro_batch: int, epochs: int, parts: list[tuple[int, int]], seed: int
) -> None:
    """Each step trains the same sequences; each rank's passes together hold each of them once, and every rank runs as
    many; each epoch has every sequence once."""
    data = hand_made([([n % 7 + 3, n, 1], [0, 1, 1]) for n in range(rows)])

    def steps_of(world_size: int, first: int, stop: int) -> list[list[int]]:
        chosen = BatchPlan(global_batch, min(micro_batch, global_batch), world_size, max_seq_len=48)
        order = TrainingOrder(data, chosen, seed)  # anew, as a resumed run builds it
        taken = []
        for number in range(first, stop):
            step = order.step(number)
            passes = [list(micro_batches(data, chosen, step.sequences, rank)) for rank in range(world_size)]
            assert len({len(each) for each in passes}) == 1
            seen = [row for each in passes for batch, _ in each if batch.num_supervised for row in segments(batch)]
            assert sorted(row[1] for row in seen) == sorted(step.sequences.tolist())
            assert sum(batch.num_supervised for each in passes for batch, _ in each) == step.supervised_tokens
            taken.append(step.sequences.tolist())
        return taken

    per_epoch = -(-rows // global_batch)
    total = epochs * per_epoch
    uninterrupted = steps_of(1, 0, total)
    resumed: list[list[int]] = []
    for world_size, steps in [*parts, (3, total)]:
        resumed += steps_of(world_size, len(resumed), min(total, len(resumed) + steps))
    assert resumed == uninterrupted
    for epoch in range(epochs):
        in_epoch = [n for step in uninterrupted[epoch * per_epoch : (epoch + 1) * per_epoch] for n in step]
        assert sorted(in_epoch) == list(range(rows))
