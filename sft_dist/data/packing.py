"""Packs rows into sequences of at most ``capacity`` tokens, as few as three heuristics find (``pack_heuristics``).

A pack of 8 tokens that holds rows of 3 and 5, and what a step makes of it:

    row              7  7  7  9  9  9  9  9
    position id      0  1  2  0  1  2  3  4
    attends to       7  .  .  9  .  .  .  .      each token sees the tokens of its own row before it, and itself
                     7  7  .  9  9  .  .  .
                     7  7  7  9  9  9  .  .
                              9  9  9  9  .
                              9  9  9  9  9
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft_dist.data.pack_heuristics import Group, best_fit, exact_fill, least_packs, priced_fill


class Packs(Sequence[NDArray[np.int64]]):
    """The rows of each sequence, in two arrays.

    Args:
        rows: [rows] row numbers, sequence after sequence.
        bounds: [sequences + 1] where each begins in ``rows``, and the last one's end.
    """

    def __init__(self, rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
        self.rows, self.bounds = rows, bounds

    @classmethod
    def of(cls, packs: Iterable[Sequence[int] | NDArray[np.int64]]) -> Packs:
        each = [np.asarray(pack, np.int64) for pack in packs]
        sizes = np.array([len(pack) for pack in each], np.int64)
        return cls(np.concatenate([*each, np.zeros(0, np.int64)]), np.concatenate([[0], np.cumsum(sizes)]))

    @classmethod
    def single(cls, num_rows: int) -> Packs:
        """A sequence a row."""
        return cls(np.arange(num_rows), np.arange(num_rows + 1))

    @classmethod
    def joined(cls, parts: Sequence[Packs]) -> Packs:
        """The sequences of one part after those of the other, which have other rows."""
        sizes = [np.diff(part.bounds) for part in parts]
        bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes]))
        return cls(np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)]), bounds)

    def where(self, chosen: NDArray[np.bool_]) -> Packs:
        """Those of which ``chosen`` [sequences] says so."""
        sizes = np.diff(self.bounds)
        bounds = np.concatenate([[0], np.cumsum(sizes[chosen])])
        return Packs(self.rows[np.repeat(chosen, sizes)], bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, number: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, number: slice) -> list[NDArray[np.int64]]: ...
    def __getitem__(self, number: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        return self.rows[self.bounds[number] : self.bounds[number + 1]]

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """[sequences] of ``values`` [rows], added up over the rows of each."""
        if len(self) == 0:
            return np.zeros(0, np.int64)
        return np.add.reduceat(values[self.rows], self.bounds[:-1])

    def largest(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """[sequences] the largest of ``values`` [rows] over the rows of each."""
        if len(self) == 0:
            return np.zeros(0, np.int64)
        return np.maximum.reduceat(values[self.rows], self.bounds[:-1])


# Tried after best-fit decreasing, where that needs more packs than the least by more than one in so many.
FURTHER_WAYS = ((exact_fill, 20_000), (priced_fill, 2_000))
# Of a window, the packs with more room than this part of the capacity are packed again with the next one, up to this
# part of its rows.
REPACKED_ROOM, REPACKED_ROWS = 1 / 32, 1 / 4


def pack_best_fit(lengths: ArrayLike, capacity: int) -> Packs:
    """Groups rows so that no group exceeds ``capacity`` tokens and few are needed.

    Deterministic: among rows of one length the first come first.

    Args:
        lengths: [rows] tokens of each row, each between 1 and ``capacity``.

    Returns:
        every row once, rows ascending within a pack.

    Example:
        >>> [pack.tolist() for pack in pack_best_fit([3, 7, 2, 5], capacity=8)]
        [[0, 3], [1], [2]]
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) == 0:
        return Packs.of([])
    if sizes.min() < 1 or sizes.max() > capacity:
        raise ValueError(f"rows must have 1 to {capacity} tokens, got {sizes.min()} to {sizes.max()}")
    counts = np.bincount(sizes, minlength=capacity + 1)
    least = least_packs(counts, capacity)
    groups = best_fit(counts.tolist(), capacity)
    for way, near_least in FURTHER_WAYS:
        if (_num_packs(groups) - least) * near_least <= least:
            break
        groups = min(groups, way(counts.tolist(), capacity), key=_num_packs)
    return _deal(sizes, groups)


def pack_in_windows(lengths: ArrayLike, capacity: int, *, window: int) -> Packs:
    """Packs each run of ``window`` rows by itself, so that a pack's rows lie near each other in the data.

    The packs of a window precede those of the next one. A window's emptiest packs, those with more than 1/32 of the
    capacity to spare and together at most a quarter as many rows as the window, are taken apart, and their rows packed
    with the next window. No row is put off twice: a pack has rows of two neighbouring windows at most. When all rows
    are in one window, the packs are those of ``pack_best_fit``.

    Args:
        lengths: [rows] tokens of each row, each between 1 and ``capacity``.
        window: rows.

    Returns:
        every row once, rows ascending within a pack.
    """
    if window < 1:
        raise ValueError(f"a window must have 1 row or more, got {window}")
    sizes = np.asarray(lengths, np.int64)
    put_off = np.zeros(0, np.int64)
    parts: list[Packs] = []
    for start in range(0, len(sizes), window):
        rows = np.concatenate([put_off, np.arange(start, min(start + window, len(sizes)))])
        local = pack_best_fit(sizes[rows], capacity)
        packs = Packs(rows[local.rows], local.bounds)
        if start + window < len(sizes):
            again = _emptiest(packs, sizes, capacity, first_row=start, most_rows=int(window * REPACKED_ROWS))
            put_off = np.sort(packs.where(again).rows)
            packs = packs.where(~again)
        parts.append(packs)
    return Packs.joined(parts)


def _num_packs(groups: list[Group]) -> int:
    return sum(packs for packs, _ in groups)


def _emptiest(
    packs: Packs, sizes: NDArray[np.int64], capacity: int, *, first_row: int, most_rows: int
) -> NDArray[np.bool_]:
    """[packs] whether one is to be packed again: all of its rows from ``first_row`` on, the emptiest first."""
    room = capacity - packs.sums(sizes)
    num_rows = np.diff(packs.bounds)
    candidates = (room > capacity * REPACKED_ROOM) & (packs.rows[packs.bounds[:-1]] >= first_row)
    order = np.flatnonzero(candidates)
    order = order[np.argsort(-room[order], kind="stable")]
    chosen = np.zeros(len(packs), np.bool_)
    chosen[order[np.cumsum(num_rows[order]) <= most_rows]] = True
    return chosen


def _deal(sizes: NDArray[np.int64], groups: list[Group]) -> Packs:
    """Gives the rows of each length to the packs, in their order."""
    num_alike = np.array([packs for packs, _ in groups], np.int64)
    num_entries = np.array([len(contents) for _, contents in groups], np.int64)
    length, times = np.array([entry for _, contents in groups for entry in contents], np.int64).T
    first_pack = np.repeat(np.cumsum(num_alike) - num_alike, num_entries)
    num_rows = times * np.repeat(num_alike, num_entries)
    # Rows in the order of their lengths meet the entries in the order of theirs.
    by_length = _stable_argsort(length)
    first_pack, times, num_rows = first_pack[by_length], times[by_length], num_rows[by_length]
    within = np.arange(len(sizes)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    pack_of = np.empty(len(sizes), np.int64)
    pack_of[_stable_argsort(sizes)] = np.repeat(first_pack, num_rows) + within // np.repeat(times, num_rows)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=int(num_alike.sum())))])
    return Packs(_stable_argsort(pack_of), bounds)


def _stable_argsort(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of values from 0 on, by their 16 bits from the lowest up: numpy sorts those in linear time."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    highest = int(values.max())
    for shift in range(16, highest.bit_length(), 16):
        digits = (values >> shift & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order
