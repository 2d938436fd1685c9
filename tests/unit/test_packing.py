"""Packing: every row once, nothing over capacity, no more packs than a naive best fit makes, few more than the least."""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sft_dist.data.length_stock import IntegerSet
from sft_dist.data.pack_heuristics import best_fit, exact_fill, least_packs, priced_fill
from sft_dist.data.packing import Packs, pack_best_fit, pack_in_windows


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
    inner = np.delete(np.arange(len(lengths)), packs.bounds[:-1])
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
    groups = best_fit(np.bincount(lengths, minlength=capacity + 1).tolist(), capacity)
    tokens = Counter[int]()
    for number, contents in groups:
        tokens[sum(length * times for length, times in contents)] += number
    assert tokens == Counter(naive_best_fit(lengths.tolist(), capacity))


@pytest.mark.parametrize("kind", ["log-normal", "bimodal", "uniform"])
def test_many_rows_fill_their_packs(kind: str) -> None:
    """Looking at every open pack would take hours."""
    capacity, lengths = 4096, drawn(kind, 200_000, 4096)
    started = time.process_time()
    packs = pack_best_fit(lengths, capacity)
    elapsed_s = time.process_time() - started
    assert_packed(packs, lengths, capacity)
    assert len(packs) <= 1.0005 * least_packs(np.bincount(lengths, minlength=capacity + 1), capacity)
    assert elapsed_s < 5


# The most packs, relative to the least that the linear program over all mixtures of lengths allows (Gilmore and Gomory
# 1961; solved with HiGHS on lengths rounded to 16 tokens). It is L2 for the first four.
@pytest.mark.parametrize(
    ("share", "low", "high", "lp", "most"),
    [
        (0.5, (500, 100), (1800, 300), 1.0000, 1.001),
        (0.5, (300, 80), (2600, 400), 1.0000, 1.0001),
        (0.3, (200, 50), (1400, 150), 1.0000, 1.004),
        (0.0, (1, 1), (1000, 200), 1.0000, 1.001),
        (0.3, (600, 100), (1700, 200), 1.0070, 1.010),
        (0.0, (1, 1), (1250, 150), 1.0479, 1.004),
    ],
)
def test_lengths_with_few_ways_to_fill_a_pack(
    share: float, low: tuple[int, int], high: tuple[int, int], lp: float, most: float
) -> None:
    rng = np.random.default_rng(0)
    rows = 200_000
    drawn = np.where(rng.random(rows) < share, rng.normal(*low, rows), rng.normal(*high, rows))
    lengths = np.clip(drawn, 8, 4096).astype(np.int64)
    packs = pack_best_fit(lengths, 4096)
    assert_packed(packs, lengths, 4096)
    assert len(packs) <= most * lp * least_packs(np.bincount(lengths, minlength=4097), 4096)


@pytest.mark.parametrize(("capacity", "step"), [(131_072, 4), (1_000_000, 40)])
def test_a_large_capacity_and_many_different_lengths(capacity: int, step: int) -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(capacity // 8, capacity // 2, step))
    started = time.process_time()
    packs = pack_best_fit(lengths, capacity)
    assert_packed(packs, lengths, capacity)
    assert len(packs) <= 1.01 * math.ceil(lengths.sum() / capacity)
    assert time.process_time() - started < 20


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


rows_and_capacity = st.integers(1, 64).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


@settings(max_examples=100, deadline=None)
@given(rows_and_capacity)
def test_every_way_takes_the_rows_of_each_length(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    counts = np.bincount(np.array(lengths, np.int64), minlength=capacity + 1).tolist()
    for way in (best_fit, exact_fill, priced_fill):
        taken = Counter[int]()
        for packs, contents in way(counts, capacity):
            assert packs > 0
            assert 0 < sum(length * times for length, times in contents) <= capacity
            for length, times in contents:
                taken[length] += packs * times
        assert taken == Counter(lengths), way


@settings(max_examples=100, deadline=None)
@given(rows_and_capacity)
def test_packs_of_any_rows(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = np.array(drawn[0], np.int64), drawn[1]
    packs = pack_best_fit(lengths, capacity)
    again = pack_best_fit(lengths, capacity)
    assert packs.rows.tolist() == again.rows.tolist()
    assert packs.bounds.tolist() == again.bounds.tolist()
    if len(lengths):
        assert_packed(packs, lengths, capacity)
    assert least_packs(np.bincount(lengths, minlength=capacity + 1), capacity) <= len(packs) <= len(lengths)


@settings(max_examples=100, deadline=None)
@given(rows_and_capacity, st.integers(1, 70))
def test_windows_of_any_rows(drawn: tuple[list[int], int], window: int) -> None:
    lengths, capacity = np.array(drawn[0], np.int64), drawn[1]
    packs = pack_in_windows(lengths, capacity, window=window)
    again = pack_in_windows(lengths, capacity, window=window)
    assert packs.rows.tolist() == again.rows.tolist()
    assert packs.bounds.tolist() == again.bounds.tolist()
    assert least_packs(np.bincount(lengths, minlength=capacity + 1), capacity) <= len(packs) <= len(lengths)
    if window >= len(lengths):
        whole = pack_best_fit(lengths, capacity)
        assert packs.rows.tolist() == whole.rows.tolist()
        assert packs.bounds.tolist() == whole.bounds.tolist()
    if not len(lengths):
        return
    assert_packed(packs, lengths, capacity)
    # A pack was made in the window of its last row or, when all of its rows were put off, in the next one.
    last_windows = [int(pack[-1]) // window for pack in packs]
    assert all(
        peak - last <= 1 for peak, last in zip(itertools.accumulate(last_windows, max), last_windows, strict=True)
    )
    windows_late = [
        (row // window, last - row // window)
        for pack, last in zip(packs, last_windows, strict=True)
        for row in pack.tolist()
    ]
    assert all(late <= 1 for _, late in windows_late)
    put_off = Counter(own for own, late in windows_late if late)
    assert all(rows <= window / 4 for rows in put_off.values())


def test_a_window_hands_its_emptiest_packs_to_the_next_one() -> None:
    # The 20 is alone in the first window and fills a pack with the 44 of the second.
    lengths = [32, 32, 20, 32, 32, 30, 44, 30, 34, 34, 5, 59]
    packs = pack_in_windows(lengths, 64, window=5)
    assert [pack.tolist() for pack in packs] == [[0, 1], [3, 4], [5, 8], [7, 9], [2, 6], [10, 11]]


def test_a_row_that_fits_nowhere_is_put_off_once() -> None:
    packs = pack_in_windows([40] * 80, 64, window=8)
    made_in = [window for window in range(10) for _ in range(8 + 2 * (window == 9) - 2 * (window == 0))]
    assert len(packs) == len(made_in) == 80
    late = [window - int(pack[0]) // 8 for window, pack in zip(made_in, packs, strict=True)]
    assert set(late) == {0, 1}


@pytest.mark.parametrize("kind", ["log-normal", "bimodal"])
def test_windows_cost_few_packs(kind: str) -> None:
    lengths = drawn(kind, 20_000, 4096)
    packs = pack_in_windows(lengths, 4096, window=5_000)
    assert_packed(packs, lengths, 4096)
    assert len(packs) <= 1.001 * len(pack_best_fit(lengths, 4096))


def test_a_window_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="a window must have 1 row or more, got 0"):
        pack_in_windows([1, 2], 8, window=0)


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """By trying all ways to put each row into a pack."""

    def search(rows: list[int], rooms: tuple[int, ...]) -> int:
        if not rows:
            return len(rooms)
        into = [n for n, room in enumerate(rooms) if room >= rows[0]]
        ways = [(*rooms[:n], rooms[n] - rows[0], *rooms[n + 1 :]) for n in into] + [(*rooms, capacity - rows[0])]
        return min(search(rows[1:], way) for way in {tuple(sorted(way)) for way in ways})

    return search(sorted(lengths, reverse=True), ())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_the_bound_is_never_above_the_fewest_packs(lengths: list[int]) -> None:
    bound = least_packs(np.bincount(lengths, minlength=13), 12)
    fewest = fewest_packs(lengths, 12)
    assert math.ceil(sum(lengths) / 12) <= bound <= fewest <= len(pack_best_fit(lengths, 12))


@settings(max_examples=100, deadline=None)
@given(rows_and_capacity)
def test_the_bound_is_that_of_martello_and_toth(drawn: tuple[list[int], int]) -> None:
    """Their definition, row by row."""
    lengths, capacity = drawn
    best = 0
    for smallest in range(capacity // 2 + 1):
        alone = [n for n in lengths if n > capacity - smallest]
        large = [n for n in lengths if capacity / 2 < n <= capacity - smallest]
        small = [n for n in lengths if smallest <= n <= capacity / 2]
        excess = sum(small) - (len(large) * capacity - sum(large))
        best = max(best, len(alone) + len(large) + max(0, math.ceil(excess / capacity)))
    assert least_packs(np.bincount(np.array(lengths, np.int64), minlength=capacity + 1), capacity) == best


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(1, 5_000)), st.sets(st.integers(1, 5_000)), st.lists(st.integers(0, 5_000), max_size=20))
def test_integer_set(added: set[int], removed: set[int], asked: list[int]) -> None:
    numbers = IntegerSet(5_000, added)
    for number in removed:
        numbers.discard(number)
    left = sorted(added - removed)
    for number in [*asked, *added]:
        assert numbers.greatest(number) == max([0, *left[: bisect.bisect_right(left, number)]])
        assert numbers.least(number) == min(left[bisect.bisect_left(left, number) :], default=0)
