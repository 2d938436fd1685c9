"""Files of tests dealt into parts that take about as long, so that several machines or runs share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

# Seconds of a test, roughly: those of commands and launchers start processes of their own.
SECONDS = {"e2e": 25, "launch": 25, "dist": 6}
OTHERS = 3


def files_of_part(tests: Iterable[Path], part: int, parts: int) -> set[Path]:
    """Files of part 1 to ``parts``, whole: the tests of one share what is costly to make.

    Args:
        tests: the file of every test.
    """
    seconds = Counter(tests)
    for file in seconds:
        seconds[file] *= SECONDS.get(file.parent.name, OTHERS)
    return _dealt(seconds, parts)[part - 1]


def _dealt(seconds: Mapping[Path, int], parts: int) -> list[set[Path]]:
    """The longest first, each to the part that has least."""
    dealt: list[set[Path]] = [set() for _ in range(parts)]
    taken = [0] * parts
    for file in sorted(seconds, key=lambda file: (-seconds[file], str(file))):
        least = taken.index(min(taken))
        dealt[least].add(file)
        taken[least] += seconds[file]
    return dealt
