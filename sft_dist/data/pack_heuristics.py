"""Three ways to fill packs, all on the histogram of the lengths.

Rows of one length are alike, so a decision is made once for all packs that will be filled alike: ten million rows are
as quick as a million. Each way takes the rows of each length and returns groups of packs with the same contents.

- ``best_fit``: best-fit decreasing. The longest row that is left goes into the fullest pack that has room for it. Never
  more than 11/9 of the fewest packs and a constant (Johnson et al. 1974, "Worst-case performance bounds for simple
  one-dimensional packing algorithms").
- ``exact_fill``: one pack after the other, exactly where that is possible, in the spirit of the minimum bin slack
  heuristic (Gupta and Ho 1999, "A new heuristic algorithm for the one-dimensional bin-packing problem").
- ``priced_fill``: the two above take what is best for the pack at hand, and where lengths have few ways to fill a pack,
  what is left at the end does not fit together. This one gives every length a price and fills a pack with what costs
  most, as column generation does (Gilmore and Gomory 1961, "A linear programming approach to the cutting-stock
  problem"). Prices rise for lengths of which more is left than of the others and fall for the rest, as in sequential
  value correction (Belov and Scheithauer 2007, "Setup and open-stacks minimization in one-dimensional stock cutting"),
  so all lengths run out together.

No floating-point function but + - * / and comparisons decides anything, so a machine makes the same packs as another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.length_stock import IntegerSet, Stock

# How many packs are filled alike, and (length, rows of it in each pack).
Group = tuple[int, list[tuple[int, int]]]

# Pairs of rows that are looked at to fill the rest of a pack.
PAIRS_TRIED = 32
# Of the histogram that prices are for, and the steps in which all rows are used up.
PRICED_LENGTHS = 128
PRICE_STEPS = 1024
# How much the price of a length rises with what is left of it, and the least, as a part of the price at the start.
PRICE_GAIN = 10.0
LEAST_PRICE = 0.05


def least_packs(counts: Sequence[int] | NDArray[np.int64], capacity: int) -> int:
    """A number that no packing is below: L2 of Martello and Toth 1990, "Lower bounds and reduction procedures for the
    bin packing problem". At least all tokens / ``capacity``, and counts that no two rows over half a pack share one.

    Args:
        counts: [capacity + 1] rows of each length.
    """
    rows = np.asarray(counts, np.int64)
    num_rows = np.concatenate([[0], np.cumsum(rows)])  # number n: of the rows shorter than n
    num_tokens = np.concatenate([[0], np.cumsum(rows * np.arange(capacity + 1))])
    half = capacity // 2 + 1
    smallest = np.arange(half)  # rows shorter than this are not looked at
    alone = num_rows[capacity + 1] - num_rows[capacity - smallest + 1]
    large = num_rows[capacity - smallest + 1] - num_rows[half]
    room_beside_large = large * capacity - (num_tokens[capacity - smallest + 1] - num_tokens[half])
    without_room = num_tokens[half] - num_tokens[smallest] - room_beside_large
    return int((alone + large + np.maximum(0, -(-without_room // capacity))).max())


def best_fit(counts: Sequence[int], capacity: int) -> list[Group]:
    """Best-fit decreasing, for all packs with equal room at a time.

    Args:
        counts: [capacity + 1] rows of each length.
    """
    by_room: dict[int, list[tuple[int, _Chain]]] = {}
    rooms = IntegerSet(capacity)

    def put(room: int, packs: int, contents: _Chain) -> None:
        if packs:
            by_room.setdefault(room, []).append((packs, contents))
            rooms.add(room)

    for length in range(capacity, 0, -1):
        left = counts[length]
        while left:
            room = rooms.least(length)
            if room:
                packs, contents = by_room[room].pop()
                if not by_room[room]:
                    rooms.discard(room)
            else:
                room, packs, contents = capacity, left, None
            # A pack that got one row has the least room that fits, so it gets the next ones too.
            each = room // length
            whole = min(packs, left // each)
            rest = left - whole * each if whole < packs else 0
            put(room - each * length, whole, (contents, length, each))
            put(room - rest * length, int(rest > 0), (contents, length, rest))
            if contents:
                put(room, packs - whole - int(rest > 0), contents)
            left -= whole * each + rest
    return [(packs, _unchained(contents)) for groups in by_room.values() for packs, contents in groups]


def exact_fill(counts: Sequence[int], capacity: int) -> list[Group]:
    """Fills a pack at a time: the longest row that is left, then one or two that fill it, or the longest that fits.

    As many packs as there are rows for are filled alike.

    Args:
        counts: [capacity + 1] rows of each length.
    """
    stock = Stock(counts, capacity)
    groups: list[Group] = []
    while longest := stock.longest(capacity):
        contents = {longest: 1}
        stock.take(longest)
        _fill(stock, contents, capacity - longest)
        groups.append((1 + stock.repeat(contents, stock.num_rows), list(contents.items())))
    return groups


def priced_fill(counts: Sequence[int], capacity: int) -> list[Group]:
    """Fills packs with the most valuable mixtures of lengths, at prices that follow what is left of each length.

    Prices are for ``PRICED_LENGTHS`` lengths, to the nearest of which the real ones count; a pack takes rows near its
    mixture's lengths, the last two so that they fill it exactly.

    Args:
        counts: [capacity + 1] rows of each length.
    """
    stock = Stock(counts, capacity)
    prices = _Prices(counts, capacity)
    each_step = -(-prices.num_tokens // (capacity * PRICE_STEPS))
    groups: list[Group] = []
    while stock.num_rows:
        mixture = prices.best_mixture()
        packs = 0
        while packs < each_step and stock.num_rows:
            contents = _fill_with(stock, mixture, capacity)
            number = 1 + stock.repeat(contents, each_step - packs - 1)
            prices.subtract(contents, number)
            groups.append((number, list(contents.items())))
            packs += number
    return groups


def _fill_with(stock: Stock, mixture: list[int], capacity: int) -> dict[int, int]:
    """Takes a pack of rows near the lengths of ``mixture`` [rows], in ``PRICED_LENGTHS`` parts of the capacity."""
    contents: dict[int, int] = {}
    room = capacity
    fills = sum(mixture) >= PRICED_LENGTHS - 1
    for parts in mixture[: -2 if fills else -1]:
        lowest, beyond = ((2 * edge - 1) * capacity // (2 * PRICED_LENGTHS) + 1 for edge in (parts, parts + 1))
        length = stock.most_frequent(lowest, min(beyond - 1, room)) or stock.longest(room)
        if not length:
            return contents
        contents[length] = contents.get(length, 0) + 1
        stock.take(length)
        room -= length
    longer = mixture[-2] / (mixture[-2] + mixture[-1]) if fills and len(mixture) > 1 else 1.0
    _fill(stock, contents, room, share=longer)
    return contents


def _fill(stock: Stock, contents: dict[int, int], room: int, *, share: float = 0.5) -> None:
    """Takes rows for ``room`` tokens until none fits, two that fill it as soon as they are found.

    Args:
        share: of the room, what the first of the two should have.
    """
    while longest := stock.longest(room):
        taken = (longest,) if longest == room or 2 * longest < room else _pair(stock, room, int(room * share))
        for length in taken:
            contents[length] = contents.get(length, 0) + 1
            stock.take(length)
            room -= length


def _pair(stock: Stock, room: int, near: int) -> tuple[int, ...]:
    """Lengths of two rows, or one, of at most ``room`` tokens: the first that fill it, or the most of those tried."""
    best: tuple[int, ...] = ()
    tokens = 0
    for one in _outward(stock, near, room):
        other = stock.longest_beside(one, room - one)
        if one + other > tokens:
            best, tokens = (one, other) if other else (one,), one + other
        if tokens == room:
            break
    return best


def _outward(stock: Stock, near: int, room: int) -> Iterator[int]:
    """Some lengths that are there, up to ``room``, the nearest to ``near`` first, in turns below and above."""
    below, above = stock.longest(near), stock.shortest(near + 1)
    for _ in range(PAIRS_TRIED // 2):
        if below:
            yield below
            below = stock.longest(below - 1)
        if 0 < above <= room:
            yield above
            above = stock.shortest(above + 1)


class _Prices:
    """What a row of each length is worth, to fill a pack with the most valuable ones."""

    def __init__(self, counts: Sequence[int], capacity: int) -> None:
        rows = np.asarray(counts, np.int64)
        lengths = np.arange(capacity + 1)
        self.num_tokens = self._tokens_left = int(rows @ lengths)
        parts = np.maximum(1, (2 * PRICED_LENGTHS * lengths + capacity) // (2 * capacity))
        self._parts = parts.tolist()
        self._left = np.bincount(parts, rows, PRICED_LENGTHS + 1)
        self._at_start = np.maximum(self._left, 1)

    def subtract(self, contents: dict[int, int], packs: int) -> None:
        for length, times in contents.items():
            self._left[self._parts[length]] -= packs * times
            self._tokens_left -= packs * times * length

    def best_mixture(self) -> list[int]:
        """[rows] of lengths in parts, the longest first, that are worth most among those that a pack has room for."""
        share = self._tokens_left / self.num_tokens
        surplus = (self._left / self._at_start - share) / max(share, 0.1)
        price = np.arange(PRICED_LENGTHS + 1) * np.maximum(1 + PRICE_GAIN * surplus, LEAST_PRICE) * (self._left > 0)
        # The unbounded knapsack problem: what a pack with each room is worth, and the row that it takes first.
        worth = np.zeros(PRICED_LENGTHS + 1)
        first = [0] * (PRICED_LENGTHS + 1)
        for room in range(1, PRICED_LENGTHS + 1):
            ways = worth[room - 1 :: -1] + price[1 : room + 1]
            best = int(ways.argmax())
            worth[room], first[room] = ways[best], best + 1
        mixture, room = [], PRICED_LENGTHS
        while room:
            if price[first[room]]:
                mixture.append(first[room])
            room -= first[room]
        return sorted(mixture, reverse=True)


# What a pack holds: all but the last rows, their length, and their number.
_Chain = tuple["_Chain", int, int] | None


def _unchained(contents: _Chain) -> list[tuple[int, int]]:
    entries = []
    while contents:
        contents, length, times = contents
        entries.append((length, times))
    return entries
