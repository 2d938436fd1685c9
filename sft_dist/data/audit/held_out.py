"""Held-out rows that are trained on: training rows are held against them as they stream by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.audit.columns import Columns
from sft_dist.data.audit.neighbours import Lookup, Signatures


@dataclass
class Leak:
    """The training row that a held-out row is most like."""

    train_row: int
    similarity: float
    is_exact: bool


@dataclass(frozen=True)
class Passing:
    """Training rows as they stream by.

    Args:
        keys, whole: [n] hashes, as in ``Hashes``.
        has_text: [n] bool.
        signed_keys, signed_contents: [n, places], or None where nothing is signed.
    """

    keys: NDArray[np.uint64]
    whole: NDArray[np.uint64]
    has_text: NDArray[np.bool_]
    signed_keys: NDArray[np.uint32] | None
    signed_contents: NDArray[np.uint32] | None


class HeldOut:
    """The held-out rows, and the leaks that were found so far by number of the held-out row.

    Args:
        columns: of the held-out set, complete.
        keys, contents: signatures of its prompts and contents, or None.
    """

    def __init__(self, columns: Columns, keys: Signatures | None, contents: Signatures | None) -> None:
        self.leaks: dict[int, Leak] = {}
        self._by_key = _numbers(columns.hashes("key"))
        self._by_key.pop(0, None)
        self._by_whole = _numbers(columns.hashes("whole"))
        self._keys = None if keys is None else Lookup(keys)
        self._contents = None if contents is None else Lookup(contents)

    def compare(self, passing: Passing, first_row: int) -> None:
        """Compares training rows, the first of which has the number ``first_row``."""
        # A held-out row is the same as the first training row that is like it; then its hash is not looked for again.
        for place, (key, whole) in enumerate(zip(passing.keys.tolist(), passing.whole.tolist(), strict=True)):
            if key in self._by_key or whole in self._by_whole:
                for row in (*self._by_key.pop(key, ()), *self._by_whole.pop(whole, ())):
                    self._note(row, Leak(first_row + place, 1.0, is_exact=True))
        # Rows without text have one signature, and short prompts are alike by chance.
        if self._keys is not None and passing.signed_keys is not None:
            self._near(self._keys, passing.signed_keys, (passing.keys != 0) & passing.has_text, first_row)
        if self._contents is not None and passing.signed_contents is not None:
            self._near(self._contents, passing.signed_contents, passing.has_text, first_row)

    def _near(self, lookup: Lookup, signed: NDArray[np.uint32], counts: NDArray[np.bool_], first_row: int) -> None:
        """Notes what ``lookup`` finds for the rows that ``counts`` [n]."""
        for place, row, found in zip(*(part.tolist() for part in lookup.similar(signed)), strict=True):
            if counts[place]:
                self._note(row, Leak(first_row + place, found, is_exact=False))

    def _note(self, row: int, leak: Leak) -> None:
        known = self.leaks.get(row)
        if known is None or (leak.is_exact, leak.similarity) > (known.is_exact, known.similarity):
            self.leaks[row] = leak


def _numbers(hashes: NDArray[np.uint64]) -> dict[int, list[int]]:
    """The rows of each hash."""
    found: dict[int, list[int]] = {}
    for row, value in enumerate(hashes.tolist()):
        found.setdefault(value, []).append(row)
    return found
