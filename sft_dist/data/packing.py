"""Packs rows into sequences of at most ``capacity`` tokens, as few as two heuristics find.

Both work on the histogram of the lengths: rows of one length are alike, so a decision is made once for all packs that
will be filled alike, and ten million rows take a second.

- Best-fit decreasing: the longest row that is left goes into the fullest pack that has room for it. Never more than
  11/9 of the fewest packs and a constant (Johnson et al. 1974, "Worst-case performance bounds for simple
  one-dimensional packing algorithms").
- Filling one pack after the other, exactly where that is possible, in the spirit of the minimum bin slack heuristic
  (Gupta and Ho 1999, "A new heuristic algorithm for the one-dimensional bin-packing problem").

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

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


# How many packs are filled alike, and how many rows of each length each of them has.
_Group = tuple[int, Counter[int]]


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
    counts = np.bincount(sizes, minlength=capacity + 1).tolist()
    ways = [_best_fit(counts, capacity), _exact_fill(counts, capacity)]
    return _deal(sizes, min(ways, key=lambda groups: sum(count for count, _ in groups)))


def _best_fit(counts: list[int], capacity: int) -> list[_Group]:
    """Best-fit decreasing, for all packs with equal room at a time.

    Args:
        counts: [capacity + 1] rows of each length.
    """
    by_room: list[list[_Group]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r is set when some pack has exactly r tokens of room
    for length in range(capacity, 0, -1):
        left = counts[length]
        while left:
            fitting = occupied >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                packs, contents = by_room[room].pop()
                if not by_room[room]:
                    occupied &= ~(1 << room)
            else:
                room, packs, contents = capacity, left, Counter()
            # A pack that got one row has the least room that fits, so it gets the next ones too.
            each = room // length
            whole = min(packs, left // each)
            rest = left - whole * each if whole < packs else 0
            for number, times in ((whole, each), (int(rest > 0), rest)):
                if number:
                    after = room - times * length
                    by_room[after].append((number, contents + Counter({length: times})))
                    occupied |= int(after > 0) << after
            untouched = packs - whole - int(rest > 0)
            if untouched and contents:
                by_room[room].append((untouched, contents))
                occupied |= 1 << room
            left -= whole * each + rest
    return [group for groups in by_room for group in groups]


def _exact_fill(counts: list[int], capacity: int) -> list[_Group]:
    """Fills a pack at a time: the longest row that is left, then one or two that fill it, or the longest that fits.

    Of the pairs that fill it, the one with the longest row. As many packs as there are rows for are filled alike.

    Args:
        counts: [capacity + 1] rows of each length.
    """
    counts = list(counts)
    # Bit n of ``there``, and bit capacity - n of ``mirrored``, is set when rows of length n are left.
    there = sum(1 << length for length, count in enumerate(counts) if count)
    mirrored = sum(1 << (capacity - length) for length, count in enumerate(counts) if count)
    groups: list[_Group] = []
    while there:
        contents: Counter[int] = Counter()
        room = capacity
        free = there  # of which the pack has not taken the last row
        free_mirrored = mirrored
        while free & ((2 << room) - 2):
            taken = _next_rows(free, free_mirrored, counts, contents, room, capacity)
            for length in taken:
                contents[length] += 1
                room -= length
                if contents[length] == counts[length]:
                    free &= ~(1 << length)
                    free_mirrored &= ~(1 << (capacity - length))
        number = min(counts[length] // times for length, times in contents.items())
        for length, times in contents.items():
            counts[length] -= number * times
            if not counts[length]:
                there &= ~(1 << length)
                mirrored &= ~(1 << (capacity - length))
        groups.append((number, contents))
    return groups


def _next_rows(
    free: int, mirrored: int, counts: list[int], contents: Counter[int], room: int, capacity: int
) -> tuple[int, ...]:
    """Lengths of the rows that a pack with ``room`` takes next, one of which fits at least."""
    fitting = free & ((2 << room) - 1)
    longest = fitting.bit_length() - 1
    if longest == room or not contents:
        return (longest,)
    # Lengths n of which room - n is there too, from half of the room on.
    half = (room + 1) // 2
    pairs = (free & (mirrored >> (capacity - room))) >> half << half & ((1 << room) - 1)
    if pairs:
        longer = pairs.bit_length() - 1
        if 2 * longer != room or counts[longer] - contents[longer] > 1:
            return longer, room - longer
    return (longest,)


def _deal(sizes: NDArray[np.int64], groups: list[_Group]) -> Packs:
    """Gives the rows of each length to the packs, in their order."""
    by_length = _stable_argsort(sizes)
    next_of = np.concatenate([[0], np.cumsum(np.bincount(sizes))]).tolist()
    pack_of = np.empty(len(sizes), np.int64)
    first = 0
    for number, contents in groups:
        for length, times in contents.items():
            start = next_of[length]
            next_of[length] = stop = start + number * times
            pack_of[by_length[start:stop]] = np.repeat(np.arange(first, first + number), times)
        first += number
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=first))])
    return Packs(_stable_argsort(pack_of), bounds)


def _stable_argsort(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of values from 0 on, by their 16 bits from the lowest up: numpy sorts those in linear time."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    highest = int(values.max())
    for shift in range(16, highest.bit_length(), 16):
        digits = (values >> shift & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order
