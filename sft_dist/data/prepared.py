"""The data that a run trains on or is evaluated on: rows of token stores, chosen and packed, mapped into memory.

A folder with ``rows.npy`` (``CHOSEN``: a record a row), ``pack_rows.npy`` and ``pack_bounds.npy`` (see ``Packs``), and
``meta.json``. Tokens stay in the stores of the sources. Mapping costs no memory per rank beyond the page cache they
share, and no time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from sft_dist.data.packing import Packs
from sft_dist.data.token_store import TokenStore

CHOSEN = np.dtype(
    [
        ("store", "<i4"),
        ("start", "<i8"),  # of the row's tokens in the store
        ("length", "<i4"),  # tokens that are left of it
        ("supervised", "<i4"),  # tokens that are trained; the first of a row is never predicted and never counts
    ]
)
ChosenRows = np.ndarray[Any, np.dtype[np.void]]

ROWS, PACK_ROWS, PACK_BOUNDS, META = "rows.npy", "pack_rows.npy", "pack_bounds.npy", "meta.json"


@dataclass(frozen=True)
class Tokens:
    """Tokens of many rows.

    Args:
        input_ids: [tokens] int32.
        supervised: [tokens] uint8, 1 where the token is trained.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.uint8]


@dataclass(frozen=True)
class PreparedData:
    """Rows and packs of one data set.

    Args:
        stores: that the rows' tokens are in.
        rows: [rows] of ``CHOSEN``.
        packs: the rows of each sequence.
        digest: of everything that is trained.
        special: how often each special token stands in the stores, by id.
        sources: name of each store.
        folder: that it was opened from; None: it is in memory alone.
    """

    stores: tuple[Tokens, ...]
    rows: ChosenRows
    packs: Packs
    digest: str
    special: dict[int, int]
    sources: tuple[str, ...]
    folder: Path | None = None

    @classmethod
    def of(cls, rows: Sequence[tuple[ArrayLike, ArrayLike]], packs: Packs | None = None) -> PreparedData:
        """Rows in memory, each (input_ids [t], supervised [t]); a sequence a row by default."""
        ids = [np.asarray(each, np.int32) for each, _ in rows]
        masks = [np.asarray(mask, np.uint8) for _, mask in rows]
        chosen = np.zeros(len(rows), CHOSEN)
        chosen["length"] = [len(each) for each in ids]
        chosen["start"] = np.cumsum(chosen["length"]) - chosen["length"]
        chosen["supervised"] = [int(mask[1:].sum()) for mask in masks]
        packs = Packs.single(len(rows)) if packs is None else packs
        tokens = Tokens(np.concatenate(ids), np.concatenate(masks))
        digest = digest_of([tokens.input_ids, tokens.supervised, chosen, packs.rows, packs.bounds])
        numbers = zip(*np.unique(tokens.input_ids, return_counts=True), strict=True)
        return cls((tokens,), chosen, packs, digest, {int(id): int(n) for id, n in numbers}, ("rows",))

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_sequences(self) -> int:
        return len(self.packs)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens."""
        return self.rows["length"].astype(np.int64)

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """[sequences]."""
        return self.packs.sums(self.lengths)

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """[sequences]."""
        return self.packs.sums(self.rows["supervised"].astype(np.int64))

    @cached_property
    def sequence_sources(self) -> NDArray[np.int64]:
        """[sequences] number of the source that the first row of each is from."""
        return self.rows["store"][self.packs.rows[self.packs.bounds[:-1]]].astype(np.int64)

    def occurring(self, ids: Iterable[int]) -> list[int]:
        """Those of ``ids``, special ones, that some row has, ascending."""
        return sorted(id for id in set(ids) if self.special.get(id))

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(input_ids [t], supervised [t]) of a row."""
        store, start, length, _ = self.rows[number].item()
        tokens = self.stores[store]
        return tokens.input_ids[start : start + length], tokens.supervised[start : start + length]


def digest_of(arrays: Iterable[NDArray[Any]], *, before: Iterable[str] = ()) -> str:
    """XXH3-128 of texts and of arrays with their lengths."""
    digest = xxhash.xxh3_128("\0".join(before).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digest.update(array.size.to_bytes(8, "little"))
    return digest.hexdigest()


def open_stores(folder: Path) -> list[TokenStore]:
    """Maps the stores that a folder's rows are in, in the order of ``PreparedData.stores``."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    return [TokenStore.open(folder / place) for place in meta["stores"]]


def origins(data: PreparedData, rows: Iterable[int]) -> dict[int, str]:
    """File and line, or row of it, that each of ``rows`` comes from."""
    if data.folder is None:
        return {row: f"row {row}" for row in rows}
    stores = open_stores(data.folder)
    starts = [store.starts for store in stores]
    found = {}
    for row in rows:
        store, start, _, _ = data.rows[row].item()
        found[row] = stores[store].origin(int(np.searchsorted(starts[store], start, side="right")) - 1)
    return found


def open_prepared(folder: Path) -> PreparedData:
    """Maps a folder that ``prepare`` made. Raises ``FileNotFoundError``."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    stores = open_stores(folder)
    special: dict[int, int] = {}
    for store in stores:
        for id, count in store.meta["special"].items():
            special[int(id)] = special.get(int(id), 0) + count
    rows: ChosenRows = np.load(folder / ROWS, mmap_mode="r")
    packs = Packs(*(np.load(folder / name, mmap_mode="r") for name in (PACK_ROWS, PACK_BOUNDS)))
    return PreparedData(
        stores=tuple(Tokens(store.input_ids, store.supervised) for store in stores),
        rows=rows,
        packs=packs,
        digest=meta["digest"],
        special=special,
        sources=tuple(meta["sources"]),
        folder=folder,
    )
