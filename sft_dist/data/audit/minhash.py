"""MinHash signatures of many texts at a time (Broder 1997, "On the resemblance and containment of documents").

A text becomes the set of its shingles, runs of k characters after normalising: 5 where it is mostly Chinese, Japanese
or Korean, which put no spaces between words, and 9 elsewhere. Place p of its signature is the least value that the p-th
hash function takes over the set; the share of places at which two signatures agree estimates the sets' Jaccard
similarity, with a standard deviation of sqrt(s (1 - s) / places).

Why not ``datasketch``, whose every text is a Python object. Measured on one core with 64 places, rows of 770 characters
(datasketch 2.0 with xxhash and ``update_batch``): it signs 3,900 rows/s, this module 30,000, normalising included; its
index keeps 6,700 bytes a row in memory, a signature here 256.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Characters of a shingle.
CJK_SHINGLE = 5
OTHER_SHINGLE = 9

# Chinese characters, kana, hangul; a text of which they are this share is cut into the shorter shingles.
_CJK = re.compile("[\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
CJK_SHARE = 0.3

# Shingles hashed at a time: buffers of this many 32-bit values stay in a core's second-level cache.
_AT_ONCE = 1 << 16

_BASE = 0x9E3779B97F4A7C15
_SEED = 20_250_131


class MinHasher:
    """Signs texts with ``num_permutations`` hash functions, the same ones in every process.

    The functions are x -> a x + b (mod 2^32), a odd, of shingles that are hashed to 32 bits before: linear functions
    are close to min-wise independent on scattered values (Bohman, Cooper and Frieze 2000).
    """

    def __init__(self, num_permutations: int) -> None:
        random = np.random.Generator(np.random.PCG64(_SEED))
        self.num_permutations = num_permutations
        self._factors = random.integers(0, 1 << 32, num_permutations, dtype=np.uint32) | np.uint32(1)
        self._offsets = random.integers(0, 1 << 32, num_permutations, dtype=np.uint32)

    def sign(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """[texts, num_permutations] of normalised texts. An empty text has the signature of one empty shingle."""
        signatures = np.empty((len(texts), self.num_permutations), np.uint32)
        is_cjk = np.array([len(_CJK.findall(text)) > CJK_SHARE * len(text) for text in texts], bool)
        for size, chosen in ((CJK_SHINGLE, np.flatnonzero(is_cjk)), (OTHER_SHINGLE, np.flatnonzero(~is_cjk))):
            for part in _batches(texts, chosen):
                values, bounds = shingle_hashes([texts[number] for number in part.tolist()], size)
                self._minima(values, bounds, signatures, part)
        return signatures

    def _minima(
        self,
        values: NDArray[np.uint32],
        bounds: NDArray[np.int64],
        signatures: NDArray[np.uint32],
        rows: NDArray[np.int64],
    ) -> None:
        buffer = np.empty_like(values)
        for place, (factor, offset) in enumerate(zip(self._factors, self._offsets, strict=True)):
            np.multiply(values, factor, out=buffer)
            np.add(buffer, offset, out=buffer)
            signatures[rows, place] = np.minimum.reduceat(buffer, bounds)


def _batches(texts: Sequence[str], numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """``numbers`` of texts in groups of about ``_AT_ONCE`` characters."""
    if not len(numbers):
        return []
    ends = np.cumsum([len(texts[number]) for number in numbers.tolist()])
    return np.split(numbers, np.flatnonzero(np.diff(ends // _AT_ONCE)) + 1)


def shingle_hashes(texts: Sequence[str], size: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Hashes of all runs of ``size`` characters of each text; a shorter text is one run.

    Returns:
        values: [shingles] of all texts, one after the other, repeated ones too.
        bounds: [texts] where each text's begin.
    """
    padded = [text.ljust(size, "\x00") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded], np.int64)
    counts = lengths - (size - 1)
    is_start = np.ones(len(codes), bool)
    ends = np.cumsum(lengths)
    for back in range(1, size):
        is_start[ends - back] = False
    rolled = _polynomial(codes, size)[is_start[: len(codes) - size + 1]]
    return _mixed(rolled), np.concatenate([[0], np.cumsum(counts)[:-1]])


def _polynomial(codes: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """[n - size + 1] of every run c of ``size`` codes: the sum of c[j] B^j (mod 2^64), by doubling."""
    total = np.zeros(0, np.uint64)
    covered, width, powers = 0, 1, codes
    while True:
        if size & width:
            piece = powers[covered : len(codes) - size + 1 + covered]
            shift = np.uint64(pow(_BASE, covered, 1 << 64))
            total = piece * shift if covered == 0 else total + piece * shift
            covered += width
        if covered == size:
            return total
        # powers[i] covers ``width`` codes from i on.
        powers = powers[: len(powers) - width] + powers[width:] * np.uint64(pow(_BASE, width, 1 << 64))
        width *= 2


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The upper half of a 64-bit finaliser (Murmur3's): neighbouring sums land far from each other."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    return (values >> np.uint64(32)).astype(np.uint32)


def similarity(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.float64]:
    """[pairs] estimated Jaccard similarity of signatures [pairs, places]."""
    equal: NDArray[np.float64] = (left == right).mean(axis=1)
    return equal
