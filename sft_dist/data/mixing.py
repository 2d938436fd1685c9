"""Which rows of each source a set has, and how often: held out or trained, and in which mixture.

Everything here is a function of the rows and the seed, so that every machine and every resumed run finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.data_schema import EvalSplitConfig, SourceConfig

Side = Literal["train", "eval"]

# Keeps draws of one seed for different ends apart.
SPLIT, MIX = 1, 2


def is_held_out(prompts: NDArray[np.uint64], split: EvalSplitConfig, *, seed: int, source: int) -> NDArray[np.bool_]:
    """[rows] whether each row of a source is evaluated.

    Args:
        prompts: [rows] hashes of the prompts.
        source: number of the source.
    """
    if split.by == "prompt":
        return prompts < np.uint64(split.share * 2.0**64)
    chosen = np.zeros(len(prompts), np.bool_)
    order = np.random.Generator(np.random.PCG64([seed, SPLIT, source])).permutation(len(prompts))
    chosen[order[: round(split.share * len(prompts))]] = True
    return chosen


def weights_of(sources: Sequence[SourceConfig], sizes: Sequence[float]) -> list[float]:
    """How often each source is seen in an epoch.

    With shares: the shortest epoch that has the shares and in which no source is seen less than once.

    Args:
        sizes: tokens or rows of each source, whichever is mixed by.
    """
    if sources[0].share is None:
        return [source.weight for source in sources]
    shares = [source.share or 0.0 for source in sources]
    epoch = max(size / share for size, share in zip(sizes, shares, strict=True))
    return [share * epoch / size for size, share in zip(sizes, shares, strict=True)]


def repeated(sizes: NDArray[np.int64], weight: float, *, seed: int, source: int) -> NDArray[np.int64]:
    """The rows of a source that is seen ``weight`` times, each as often as it is seen, ascending within each time.

    Args:
        sizes: [rows] tokens of each row, or ones.
        source: number of the source.
    """
    times, rest = divmod(weight, 1.0)
    whole = np.tile(np.arange(len(sizes)), int(times))
    wanted = rest * float(sizes.sum())
    order = np.random.Generator(np.random.PCG64([seed, MIX, source])).permutation(len(sizes))
    reached = np.cumsum(sizes[order])
    # As many rows as come closest to what is wanted.
    number = int(np.argmin(np.abs(np.concatenate([[0], reached]) - wanted))) if wanted else 0
    return np.concatenate([whole, np.sort(order[:number])])
