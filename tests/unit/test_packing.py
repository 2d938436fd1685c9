"""Packing: every row once, nothing over capacity, and no more packs than a naive best fit makes."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from sft_dist.data import packing
from sft_dist.data.packing import Packs, pack_best_fit


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Tokens of the packs that best-fit decreasing makes, by looking at every open pack."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda n: rooms[n])] -= length
    return [capacity - room for room in rooms]


def drawn(kind: str, rows: int, capacity: int, seed: int = 0) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    values = {
        "log-normal": lambda: rng.lognormal(math.log(capacity / 12), 0.9, rows),
        "bimodal": lambda: np.where(
            rng.random(rows) < 0.5, rng.normal(capacity / 12, capacity / 50, rows), rng.normal(capacity / 1.6, capacity / 10, rows)
        ),
        "uniform": lambda: rng.integers(1, capacity + 1, rows),
        "few lengths": lambda: rng.choice(rng.integers(1, capacity + 1, 4), rows),
    }  # fmt: skip
    return np.clip(values[kind](), 1, capacity).astype(np.int64)


def assert_packed(packs: Packs, lengths: NDArray[np.int64], capacity: int) -> None:
    assert np.array_equal(np.sort(packs.rows), np.arange(len(lengths)))
    assert packs.bounds[0] == 0
    assert packs.bounds[-1] == len(lengths)
    assert (np.diff(packs.bounds) > 0).all()
    assert packs.sums(lengths).max() <= capacity
    inner = np.setdiff1d(np.arange(1, len(lengths)), packs.bounds)
    assert (packs.rows[inner] > packs.rows[inner - 1]).all(), "rows must ascend within a pack"


@pytest.mark.parametrize("kind", ["log-normal", "bimodal", "uniform", "few lengths"])
@pytest.mark.parametrize("seed", range(12))
def test_no_more_packs_than_a_naive_best_fit(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 80))
    lengths = drawn(kind, int(rng.integers(1, 200)), capacity, seed)
    packs = pack_best_fit(lengths, capacity)
    assert_packed(packs, lengths, capacity)
    assert len(packs) <= len(naive_best_fit(lengths.tolist(), capacity))


@pytest.mark.parametrize("seed", range(12))
def test_best_fit_of_all_rows_of_a_length_is_that_of_one_after_the_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, size=int(rng.integers(1, 300)))
    groups = packing._best_fit(np.bincount(lengths, minlength=capacity + 1).tolist(), capacity)
    tokens = Counter[int]()
    for number, contents in groups:
        tokens[sum(length * times for length, times in contents.items())] += number
    assert tokens == Counter(naive_best_fit(lengths.tolist(), capacity))


@pytest.mark.parametrize("kind", ["log-normal", "bimodal", "uniform"])
def test_many_rows_fill_their_packs(kind: str) -> None:
    """A million rows: 0.1 s; looking at every open pack would take hours."""
    capacity, lengths = 4096, drawn(kind, 1_000_000, 4096)
    started = time.process_time()
    packs = pack_best_fit(lengths, capacity)
    elapsed_s = time.process_time() - started
    assert_packed(packs, lengths, capacity)
    # Rows longer than half a pack need one each.
    least = max(math.ceil(lengths.sum() / capacity), int((lengths > capacity // 2).sum()))
    assert len(packs) <= (1.002 if kind == "uniform" else 1.001) * least
    assert elapsed_s < 5


def test_the_same_rows_make_the_same_packs() -> None:
    lengths = drawn("log-normal", 2_000, 1024)
    one, other = pack_best_fit(lengths, 1024), pack_best_fit(lengths.tolist(), 1024)
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.bounds, other.bounds)


@pytest.mark.parametrize(
    ("lengths", "capacity", "packs"),
    [
        ([], 8, []),
        ([8, 8, 8], 8, [[0], [1], [2]]),
        ([1] * 7, 3, [[0, 1, 2], [3, 4, 5], [6]]),
        ([1], 1, [[0]]),
        ([3, 7, 2, 5], 8, [[0, 3], [1], [2]]),
        ([1, 7], 8, [[0, 1]]),
        # Worst fit would put the 2 beside the 5, and the 3 would need a third pack.
        ([6, 5, 3, 2], 8, [[0, 3], [1, 2]]),
        # Best fit puts 5 and 4 together and needs three; 5 + 3 + 2 and 4 + 4 + 2 are full.
        ([5, 4, 4, 3, 2, 2], 10, [[0, 3, 4], [1, 2, 5]]),
    ],
    ids=["nothing", "all full", "ones", "one", "example", "exact fit", "fullest first", "filled exactly"],
)
def test_edges(lengths: list[int], capacity: int, packs: list[list[int]]) -> None:
    assert sorted(pack.tolist() for pack in pack_best_fit(lengths, capacity)) == packs


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3], [-1]])
def test_a_row_that_cannot_be_packed_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="rows must have 1 to 8 tokens"):
        pack_best_fit(lengths, 8)


def test_packs_are_a_sequence() -> None:
    packs = Packs.of([[0, 3], [1], [2, 4]])
    assert [pack.tolist() for pack in packs] == [[0, 3], [1], [2, 4]]
    assert packs[-1].tolist() == [2, 4]
    assert [pack.tolist() for pack in packs[1:]] == [[1], [2, 4]]
    assert packs.sums(np.array([1, 10, 100, 1000, 10000])).tolist() == [1001, 10, 10100]
    with pytest.raises(IndexError):
        packs[3]
    assert [pack.tolist() for pack in Packs.single(2)] == [[0], [1]]
