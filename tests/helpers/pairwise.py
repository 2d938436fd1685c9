"""A small set of combinations in which every two values that go together meet (pairwise testing)."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

MAX_CANDIDATES = 200


def pairwise(cells: Sequence[tuple[Hashable, ...]]) -> list[tuple[Hashable, ...]]:
    """Some of ``cells`` that hold every pair of values that any of them holds; the same ones each time.

    Greedy: of the cells with the first pair that is missing, the one that brings most pairs.
    """
    missing = dict.fromkeys(pair for cell in cells for pair in itertools.combinations(cell, 2))
    chosen = []
    while missing:
        first = next(iter(missing))
        candidates = itertools.islice((cell for cell in cells if set(first) <= set(cell)), MAX_CANDIDATES)
        best = max(candidates, key=lambda cell: sum(pair in missing for pair in itertools.combinations(cell, 2)))
        chosen.append(best)
        for pair in itertools.combinations(best, 2):
            missing.pop(pair, None)
    return chosen
