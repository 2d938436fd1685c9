"""What is counted over a stream in bounded memory: examples, frequent beginnings, a sample of answers."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.audit.findings import Example, Prefix

MAX_EXAMPLES = 5

_PREFIX_WORDS = 4
_PREFIX_CHARACTERS = 24
_PREFIX_CJK_CHARACTERS = 8


class Tally:
    """Counts by (source, name), each with its first examples."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], list[Example]] = {}

    def add(self, source: str, name: str, origin: object, text: str) -> None:
        key = (source, name)
        self.counts[key] += 1
        if text and self.counts[key] <= MAX_EXAMPLES:
            self._examples.setdefault(key, []).append(Example(str(origin), text))

    def examples(self, source: str, name: str) -> list[Example]:
        return self._examples.get((source, name), [])

    def of_source(self, source: str, prefix: str) -> dict[str, int]:
        """Counts of the names that begin with ``prefix``, without it."""
        return {
            name.removeprefix(prefix): count
            for (of, name), count in self.counts.items()
            if of == source and name.startswith(prefix)
        }


class FrequentPrefixes:
    """The most frequent beginnings of a stream of texts (Misra and Gries 1982).

    Holds at most twice ``capacity`` of them. A count is too low by at most texts / capacity, never too high.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._counts: Counter[str] = Counter()
        self._texts = 0

    def add(self, text: str) -> None:
        """Counts a normalised text; an empty one has no beginning."""
        if not text:
            return
        self._texts += 1
        self._counts[prefix_of(text)] += 1
        if len(self._counts) > 2 * self._capacity:
            least = self._counts.most_common(self._capacity + 1)[-1][1]
            self._counts = Counter({key: count - least for key, count in self._counts.items() if count > least})

    def top(self, number: int) -> tuple[Prefix, ...]:
        """Those that more than one text has."""
        return tuple(Prefix(text, count / self._texts) for text, count in self._counts.most_common(number) if count > 1)


def prefix_of(text: str) -> str:
    """The first words, or the first characters where words have no spaces between them."""
    words = text[:200].split(" ", _PREFIX_WORDS)[:_PREFIX_WORDS]
    if any(character > "\u2e7f" for character in text[:_PREFIX_CJK_CHARACTERS]):
        return text[:_PREFIX_CJK_CHARACTERS]
    return " ".join(words)[: 2 * _PREFIX_CHARACTERS]


def _grams(units: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Runs of n units as one number each: token ids and code points have 21 bits at most."""
    total = np.zeros(len(units) - n + 1, np.int64)
    for place in range(n):
        total = total << 21 | units[place : len(units) - n + 1 + place]
    return total


class AnswerSample:
    """Answers drawn from a stream, each with the same chance (reservoir sampling, Vitter 1985, algorithm R)."""

    def __init__(self, size: int = 2000, units: int = 256) -> None:
        self._size, self._units = size, units
        self._random = random.Random(0)
        self._seen = 0
        self._kept: list[NDArray[np.int64]] = []

    def place(self) -> int | None:
        """Where the next answer goes, or None: it is not drawn. To be followed by ``keep``."""
        self._seen += 1
        if len(self._kept) < self._size:
            return len(self._kept)
        drawn = self._random.randrange(self._seen)
        return drawn if drawn < self._size else None

    def keep(self, place: int, units: list[int]) -> None:
        """Keeps an answer as the numbers of its first tokens or characters."""
        answer = np.asarray(units[: self._units], np.int64)
        if place == len(self._kept):
            self._kept.append(answer)
        else:
            self._kept[place] = answer

    def distinct_n(self) -> dict[str, float]:
        """For n = 1, 2, 3 different n-grams over all n-grams; 0 where no answer is long enough."""
        found = {}
        for n in (1, 2, 3):
            grams = [_grams(answer, n) for answer in self._kept if len(answer) >= n]
            every = np.concatenate([*grams, np.zeros(0, np.int64)])
            found[str(n)] = len(np.unique(every)) / len(every) if len(every) else 0.0
        return found
