"""Packing lengths: time and number of packs, against TRL's best-fit decreasing. Both use one core."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.data_parts.peers import install_trl
from sft_dist.data.pack_heuristics import least_packs
from sft_dist.data.packing import pack_best_fit, pack_in_windows

CAPACITY = 4096
WINDOW = 10_000
# As datasets.map hands rows to TRL's packing, if nothing else is said.
TRL_ROWS_AT_ONCE = 1000

Lengths = NDArray[np.int64]
Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def _bimodal(one: tuple[float, float], other: tuple[float, float]) -> Draw:
    return lambda rng, rows: np.where(rng.random(rows) < 0.5, rng.normal(*one, rows), rng.normal(*other, rows))


DISTRIBUTIONS: dict[str, Draw] = {
    "log-normal(5.8, 0.9)": lambda rng, rows: rng.lognormal(5.8, 0.9, rows),
    "log-normal(6.8, 0.7)": lambda rng, rows: rng.lognormal(6.8, 0.7, rows),
    "bimodal(300±80, 2600±400)": _bimodal((300, 80), (2600, 400)),
    "bimodal(500±100, 1800±300)": _bimodal((500, 100), (1800, 300)),
}


@dataclass(frozen=True)
class Packed:
    """One way to pack the lengths of one distribution.

    Args:
        bound: max(all tokens / capacity, L2 of Martello and Toth 1990), that no packing is below.
    """

    distribution: str
    way: str
    rows: int
    seconds: float
    packs: int
    bound: int

    @property
    def excess(self) -> float:
        """Packs, in parts of the bound."""
        return self.packs / self.bound


def draw(distribution: str, rows: int) -> Lengths:
    return np.clip(DISTRIBUTIONS[distribution](np.random.default_rng(0), rows), 8, CAPACITY).astype(np.int64)


def measure(*, rows: int, peer_rows: int) -> Iterator[Packed]:
    """Packs ``rows`` lengths of every distribution our way, and ``peer_rows`` of them both ways."""
    trl_pack = load_trl(install_trl()) if peer_rows else None
    for name in DISTRIBUTIONS:
        lengths = draw(name, rows)
        yield _timed(name, "sft_dist", lengths, lambda some: len(pack_best_fit(some, CAPACITY)))
        yield _timed(
            name,
            f"sft_dist, windows of {WINDOW:,}",
            lengths,
            lambda some: len(pack_in_windows(some, CAPACITY, window=WINDOW)),
        )
        if trl_pack is None:
            continue
        some = lengths[:peer_rows]
        if peer_rows < rows:
            yield _timed(name, "sft_dist", some, lambda some: len(pack_best_fit(some, CAPACITY)))
        yield _timed(name, "TRL bfd, all at once", some, trl_pack)
        yield _timed(
            name,
            f"TRL bfd, {TRL_ROWS_AT_ONCE:,} at once (default)",
            some,
            lambda some: sum(
                trl_pack(part) for part in np.split(some, range(TRL_ROWS_AT_ONCE, len(some), TRL_ROWS_AT_ONCE))
            ),
        )


def load_trl(folder: Path) -> Callable[[Lengths], int]:
    """TRL's packing of a table: number of packs from lengths. The rows hold nulls, which take no memory."""
    sys.path.insert(0, str(folder))
    from trl.data_utils import _pack_bfd

    def pack(lengths: Lengths) -> int:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        column = pa.LargeListArray.from_arrays(offsets, pa.nulls(int(offsets[-1])))
        return len(_pack_bfd(pa.table({"input_ids": column}), CAPACITY))

    return pack


def _timed(distribution: str, way: str, lengths: Lengths, pack: Callable[[Lengths], int]) -> Packed:
    print(f"packing {len(lengths):,} lengths, {distribution}, {way}", file=sys.stderr)
    started = time.process_time()
    packs = pack(lengths)
    seconds = time.process_time() - started
    bound = least_packs(np.bincount(lengths, minlength=CAPACITY + 1), CAPACITY)
    return Packed(distribution, way, len(lengths), seconds, packs, bound)
