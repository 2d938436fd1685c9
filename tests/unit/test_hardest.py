"""The hardest micro-batch of a run is the one that a look at all of them finds."""

from __future__ import annotations

import numpy as np
import pytest

from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import TrainingOrder, micro_batches
from sft_dist.data.packing import Packs
from sft_dist.data.prepared import PreparedData
from sft_dist.train.hardest import hardest_evaluation, hardest_steps
from tests.helpers import cells

PLANS = [BatchPlan(7, 2, 2, 48), BatchPlan(8, 1, 3, 48), BatchPlan(4, 4, 1, 48), BatchPlan(6, 1, 2, 48, 2)]


def passes(data: PreparedData, plan: BatchPlan, sequences: np.ndarray) -> list[list[tuple[int, int]]]:  # type: ignore[type-arg]
    """(tokens, longest row) of every micro-batch that is not empty, by pass and group of ranks."""
    by_rank = [
        [(b.num_tokens, b.max_seq_len) for b, _ in micro_batches(data, plan, sequences, rank * plan.sequence_parallel)]
        for rank in range(plan.world_size)
    ]
    return [list(each) for each in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_micro_batch_is_harder(plan: BatchPlan, packing: bool, seed: int) -> None:
    data = cells.synthetic_data(rows=60, seed=seed, packing=packing)
    order = TrainingOrder(data, plan, seed)
    first, last = 2, 2 * order.steps_per_epoch + 1
    steps = {n: passes(data, plan, order.step(n).sequences) for n in range(first, last)}
    of_all = [each for step in steps.values() for row in step for each in row]
    found = hardest_steps(order, first=first, last=last)
    assert (found[0].tokens, found[0].longest_row) == max(of_all)
    longest = max(row for _, row in of_all)
    assert longest in {each.longest_row for each in found}
    if len(found) > 1:
        assert found[0].longest_row < longest
        assert found[1].tokens == max(tokens for tokens, row in of_all if row == longest)
    for each in found:
        as_run, rehearsed = steps[each.number], passes(data, plan, each.step.sequences)
        assert sorted(map(tuple, rehearsed)) == sorted(map(tuple, as_run)), "the same micro-batches"
        assert any((each.tokens, each.longest_row) in row for row in rehearsed)
        size = plan.micro_batch_size * plan.world_size
        if len(each.step.sequences) >= 2 * size:
            in_later = any((each.tokens, each.longest_row) in row for row in rehearsed[1:])
            assert in_later, "beside the gradients of another one"
        assert each.step.supervised_tokens == data.num_supervised[each.step.sequences].sum()


def test_a_long_row_that_is_in_no_long_micro_batch() -> None:
    lengths = [10] * 8 + [5] * 7 + [30]
    packs = Packs.of([[0, 1, 2, 3], [4, 5, 6, 7], *([n] for n in range(8, 16))])
    data = PreparedData.of([(np.arange(n) + 3, np.ones(n)) for n in lengths], packs)
    order = TrainingOrder(data, BatchPlan(2, 1, 1, 48), 0)
    found = hardest_steps(order, first=0, last=order.steps_per_epoch)
    assert [(each.tokens, each.longest_row) for each in found] == [(40, 10), (30, 30)]


@pytest.mark.parametrize("plan", PLANS)
def test_the_hardest_part_of_an_evaluation(plan: BatchPlan) -> None:
    data = cells.synthetic_data(rows=23, seed=1, packing=False)
    data.rows["store"][9:] = 1
    two = PreparedData(data.stores * 2, data.rows, data.packs, data.digest, data.special, ("a", "b"))
    by_source = [passes(two, plan, np.flatnonzero(two.sequence_sources == source)) for source in (0, 1)]
    fullest = [[max(tokens for tokens, _ in row) for row in source] for source in by_source]
    found = hardest_evaluation(two, plan)
    assert found.largest == max(map(max, fullest))
    assert found.tokens == sum(map(max, fullest))
    assert found.all_tokens == sum(map(sum, fullest))
    for source in (0, 1):
        (only,) = passes(found.data, plan, np.flatnonzero(found.data.sequence_sources == source))
        assert only in by_source[source]
        assert max(tokens for tokens, _ in only) == max(fullest[source])
