"""Packing: every row once, nothing over capacity, and the very packs that a naive best fit makes."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from sft_dist.data.packing import pack_best_fit


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every open pack; among equally full ones the last that was added to."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    touched: list[int] = []
    for clock, row in enumerate(sorted(range(len(lengths)), key=lambda r: -lengths[r])):
        candidates = [p for p in range(len(packs)) if rooms[p] >= lengths[row]]
        if not candidates:
            packs.append([])
            rooms.append(capacity)
            touched.append(clock)
            candidates = [len(packs) - 1]
        best = min(candidates, key=lambda p: (rooms[p], -touched[p]))
        packs[best].append(row)
        rooms[best] -= lengths[row]
        touched[best] = clock
    return [sorted(pack) for pack in packs]


def realistic_lengths(rows: int, capacity: int) -> list[int]:
    """Log-normal chat rows, a few of them as long as a pack."""
    drawn = np.random.default_rng(0).lognormal(mean=5.8, sigma=0.9, size=rows)
    return np.clip(drawn, 8, capacity).astype(int).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_packs_are_those_of_a_naive_best_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, size=int(rng.integers(1, 120))).tolist()
    assert pack_best_fit(lengths, capacity) == naive_best_fit(lengths, capacity)


def test_a_realistic_mix_fills_its_packs() -> None:
    capacity = 4096
    lengths = realistic_lengths(20_000, capacity)
    started = time.process_time()
    packs = pack_best_fit(lengths, capacity)
    elapsed_s = time.process_time() - started

    tokens = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(tokens) <= capacity
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert len(packs) <= 1.02 * math.ceil(sum(lengths) / capacity)
    # About 0.05 s; a quadratic search takes minutes.
    assert elapsed_s < 3


def test_the_same_rows_make_the_same_packs() -> None:
    lengths = realistic_lengths(2_000, 1024)
    assert pack_best_fit(lengths, 1024) == pack_best_fit(np.array(lengths), 1024)  # type: ignore[arg-type]


def test_rows_ascend_within_a_pack() -> None:
    packs = pack_best_fit(np.random.default_rng(1).integers(1, 9, size=50).tolist(), 20)
    assert any(len(pack) > 1 for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)


@pytest.mark.parametrize(
    ("lengths", "capacity", "packs"),
    [
        ([], 8, []),
        ([8, 8, 8], 8, [[0], [1], [2]]),
        ([1] * 7, 3, [[0, 1, 2], [3, 4, 5], [6]]),
        ([1], 1, [[0]]),
        ([3, 7, 2, 5], 8, [[1], [0, 3], [2]]),
        ([1, 7], 8, [[0, 1]]),
        # Worst fit would put the 2 beside the 5, and the 3 would need a third pack.
        ([6, 5, 3, 2], 8, [[0, 3], [1, 2]]),
    ],
    ids=["nothing", "all full", "ones", "one", "example", "exact fit", "fullest first"],
)
def test_edges(lengths: list[int], capacity: int, packs: list[list[int]]) -> None:
    assert pack_best_fit(lengths, capacity) == packs


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3], [-1]])
def test_a_row_that_cannot_be_packed_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="rows must have 1 to 8 tokens"):
        pack_best_fit(lengths, 8)
