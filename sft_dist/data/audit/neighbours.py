"""Which signatures are similar, without comparing all with all: banding (Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4).

A signature is cut into bands of r places. Two texts of similarity s agree in a whole band with probability s^r, and in
one of b bands at least with 1 - (1 - s^r)^b. Those are compared over all places.

Signatures are sorted by each band, then by the band that follows; a row is compared with the next ``WINDOW`` rows that
have the same band. Similar rows stand next to each other, so all of a cluster are joined, while rows that share a
template and no more do not make the time grow with their square.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.audit.minhash import similarity

# Rows after it in the order of a band that a row is compared with.
WINDOW = 8

# Least probability that two rows of the wanted similarity are compared at all.
RECALL = 0.99

_BLOCK_ROWS = 1 << 15
_HIGH = np.uint64(0xFFFFFFFF00000000)

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""(left, right, similarity) of pairs of rows."""


def band_rows(num_permutations: int, similarity: float) -> int:
    """The longest bands with which rows of ``similarity`` are still compared with probability ``RECALL``."""
    for rows in range(num_permutations, 1, -1):
        if 1 - (1 - similarity**rows) ** (num_permutations // rows) >= RECALL:
            return rows
    return 1


class Signatures:
    """Signatures in blocks of fixed size, so that none is ever copied to grow: 4 bytes a place and row."""

    def __init__(self, num_permutations: int, threshold: float) -> None:
        self.threshold = threshold
        self.band_rows = band_rows(num_permutations, threshold)
        self.num_bands = num_permutations // self.band_rows
        self._places = num_permutations
        self._blocks: list[NDArray[np.uint32]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def extend(self, signatures: NDArray[np.uint32]) -> None:
        """Adds rows [n, places]."""
        while len(signatures):
            used = self._count % _BLOCK_ROWS
            if used == 0:
                self._blocks.append(np.empty((_BLOCK_ROWS, self._places), np.uint32))
            taken = signatures[: _BLOCK_ROWS - used]
            self._blocks[-1][used : used + len(taken)] = taken
            self._count += len(taken)
            signatures = signatures[len(taken) :]

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.uint32]:
        """[n, places] of rows by number."""
        chosen = np.empty((len(numbers), self._places), np.uint32)
        blocks = numbers // _BLOCK_ROWS
        for block in np.unique(blocks):
            here = blocks == block
            chosen[here] = self._blocks[block][numbers[here] % _BLOCK_ROWS]
        return chosen

    def keys(self, band: int) -> NDArray[np.uint64]:
        """[rows] the upper half tells the band's content, the lower half that of the next one."""
        keys = np.empty(self._count, np.uint64)
        for number, block in enumerate(self._blocks):
            part = slice(number * _BLOCK_ROWS, min((number + 1) * _BLOCK_ROWS, self._count))
            keys[part] = self.keys_of(block[: part.stop - part.start], band)
        return keys

    def keys_of(self, signatures: NDArray[np.uint32], band: int) -> NDArray[np.uint64]:
        """``keys`` of other signatures [n, places]."""
        following = (band + 1) % self.num_bands
        return (self._digest(signatures, band) & _HIGH) | (self._digest(signatures, following) >> np.uint64(32))

    def _digest(self, signatures: NDArray[np.uint32], band: int) -> NDArray[np.uint64]:
        digest = np.zeros(len(signatures), np.uint64)
        for place in range(band * self.band_rows, (band + 1) * self.band_rows):
            digest = (digest ^ signatures[:, place]) * np.uint64(0x9FB21C651E98DF25)
            digest ^= digest >> np.uint64(29)
        return digest * np.uint64(0xD6E8FEB86659FD93)

    def similar_pairs(self, kept: NDArray[np.bool_]) -> Iterator[Pairs]:
        """Pairs of ``kept`` rows whose similarity is the threshold at least, band by band; a pair may come again."""
        numbers = np.flatnonzero(kept)
        for band in range(self.num_bands):
            keys = self.keys(band)[numbers]
            order = np.argsort(keys)
            keys, rows = keys[order] & _HIGH, numbers[order]
            for distance in range(1, WINDOW + 1):
                first = np.flatnonzero(keys[:-distance] == keys[distance:])
                if not len(first):
                    break  # equal keys are neighbours: nothing farther apart is equal either
                yield from self._verified(rows[first], rows[first + distance])

    def _verified(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> Iterator[Pairs]:
        for start in range(0, len(left), _BLOCK_ROWS):
            a, b = left[start : start + _BLOCK_ROWS], right[start : start + _BLOCK_ROWS]
            found = similarity(self.rows(a), self.rows(b))
            same = found >= self.threshold
            if same.any():
                yield a[same], b[same], found[same]


class Lookup:
    """Finds rows of a small set of signatures that are similar to rows that stream by."""

    def __init__(self, signatures: Signatures) -> None:
        self._signatures = signatures
        self._bands = []
        for band in range(signatures.num_bands):
            keys = signatures.keys(band)
            order = np.argsort(keys)
            self._bands.append((keys[order], order))

    def similar(self, others: NDArray[np.uint32]) -> Pairs:
        """Pairs (row of ``others`` [n, places], row of the set, similarity) that reach the threshold, each once."""
        found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for band, (keys, order) in enumerate(self._bands):
            wanted = self._signatures.keys_of(others, band)
            place = np.searchsorted(keys, wanted)
            for offset in range(-WINDOW, WINDOW):
                at = place + offset
                near = np.flatnonzero((at >= 0) & (at < len(keys)))
                near = near[(keys[at[near]] & _HIGH) == (wanted[near] & _HIGH)]
                if len(near):
                    found.append((near, order[at[near]]))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        pairs = np.unique(np.concatenate([np.stack(pair, axis=1) for pair in found]), axis=0)
        left, right = pairs[:, 0], pairs[:, 1]
        values = similarity(others[left], self._signatures.rows(right))
        same = values >= self._signatures.threshold
        return left[same], right[same], values[same]


def clusters(count: int, pairs: Iterator[Pairs]) -> NDArray[np.int64]:
    """[count] the first row of each row's cluster: rows joined by pairs, directly or through others (union-find)."""
    parent = np.arange(count)
    for left, right, _ in pairs:
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            a, b = _root(parent, a), _root(parent, b)
            if a != b:
                parent[max(a, b)] = min(a, b)
    while True:
        higher = parent[parent]
        if np.array_equal(higher, parent):
            return parent
        parent = higher


def _root(parent: NDArray[np.int64], row: int) -> int:
    while (above := int(parent[row])) != row:
        parent[row] = parent[above]  # halves the path for the next one
        row = above
    return row
