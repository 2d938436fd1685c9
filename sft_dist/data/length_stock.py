"""The rows that are still to be packed, by length, and a set of integers that finds the next one quickly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Lengths that are looked through for the most frequent one.
LOOKED_THROUGH = 1024


class Stock:
    """The rows that are left, by length."""

    def __init__(self, counts: Sequence[int], capacity: int) -> None:
        self._counts = list(counts)
        self._there = IntegerSet(capacity, (length for length, count in enumerate(counts) if count))
        self.num_rows = sum(counts)
        self.longest, self.shortest = self._there.greatest, self._there.least

    def longest_beside(self, length: int, most: int) -> int:
        """The longest of at most ``most`` tokens when one row of ``length`` is taken, or 0."""
        found = self.longest(most)
        return self.longest(found - 1) if found == length and self._counts[found] == 1 else found

    def most_frequent(self, low: int, high: int) -> int:
        """Of the lengths from ``low`` to ``high`` or, where these are many, of the longest of them; 0 for none."""
        high = self.longest(high)
        rows = self._counts[max(low, high - LOOKED_THROUGH) : high + 1]
        return high + 1 - len(rows) + rows.index(max(rows)) if rows else 0

    def take(self, length: int) -> None:
        self._counts[length] -= 1
        self.num_rows -= 1
        if not self._counts[length]:
            self._there.discard(length)

    def repeat(self, contents: dict[int, int], most: int) -> int:
        """Takes the rows of up to ``most`` more packs with these contents; returns how many there were rows for."""
        packs = min(most, *(self._counts[length] // times for length, times in contents.items()))
        if packs:
            for length, times in contents.items():
                self._counts[length] -= packs * times
                self.num_rows -= packs * times
                if not self._counts[length]:
                    self._there.discard(length)
        return packs


class IntegerSet:
    """Integers from 1 to ``most``, as bits in words, and a bit for each word that is not zero.

    Finding the next one takes the same time in sets of ten and of a million.
    """

    BITS = 10  # of 2**BITS bits is a word

    def __init__(self, most: int, members: Iterable[int] = ()) -> None:
        self._words = [0] * ((most >> self.BITS) + 2)
        self._used = 0
        for member in members:
            self.add(member)

    def add(self, member: int) -> None:
        word = member >> self.BITS
        self._words[word] |= 1 << (member & (1 << self.BITS) - 1)
        self._used |= 1 << word

    def discard(self, member: int) -> None:
        word = member >> self.BITS
        self._words[word] &= ~(1 << (member & (1 << self.BITS) - 1))
        if not self._words[word]:
            self._used &= ~(1 << word)

    def greatest(self, most: int) -> int:
        """The greatest of at most ``most``, or 0."""
        if most <= 0:
            return 0
        word = most >> self.BITS
        bits = self._words[word] & ((2 << (most & (1 << self.BITS) - 1)) - 1)
        if not bits:
            used = self._used & ((1 << word) - 1)
            if not used:
                return 0
            word = used.bit_length() - 1
            bits = self._words[word]
        return (word << self.BITS) + bits.bit_length() - 1

    def least(self, least: int) -> int:
        """The least of at least ``least``, or 0."""
        word = least >> self.BITS
        if word >= len(self._words):
            return 0
        bits = self._words[word] >> (least & (1 << self.BITS) - 1)
        if bits:
            return least + (bits & -bits).bit_length() - 1
        used = self._used >> (word + 1)
        if not used:
            return 0
        word += (used & -used).bit_length()
        bits = self._words[word]
        return (word << self.BITS) + (bits & -bits).bit_length() - 1
