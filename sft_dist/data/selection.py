"""Which rows of the token stores are trained, how much of each, and in which packs."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import DataConfig
from sft_dist.data.packing import Packs, pack_best_fit
from sft_dist.data.prepared import CHOSEN, META, PACK_BOUNDS, PACK_ROWS, ROWS, ChosenRows, digest_of
from sft_dist.data.token_store import TokenStore
from sft_dist.errors import DataError


@dataclass(frozen=True)
class NamedStore:
    """A source's rows under the name by which the source is reported."""

    name: str
    store: TokenStore


def select(stores: Sequence[NamedStore], data: DataConfig, folder: Path, *, key: str) -> None:
    """Chooses and packs the rows of one set into ``folder``, which appears when it is complete.

    Args:
        key: of the configuration, for messages (``data.train``).

    Raises:
        DataError: a row is over-long under ``over_length: error``, or nothing is left.
    """
    chosen, counts = [], {}
    for index, named in enumerate(stores):
        rows, counts[named.name] = fit(index, named.store, data)
        chosen.append(rows)
    if data.over_length == "error":
        _refuse_long_rows(stores, data, key)
    rows = np.concatenate(chosen)
    if not len(rows):
        raise DataError(
            f"{key}: none of {sum(count['dropped_rows'] + count['unanswered_rows'] for count in counts.values())} rows "
            f"is left after data.over_length={data.over_length}",
            fix=f"raise data.max_seq_len above {data.max_seq_len}, or shorten the prompts",
        )
    lengths = rows["length"].astype(np.int64)
    packs = pack_best_fit(lengths, data.max_seq_len) if data.packing == "best_fit" else Packs.single(len(rows))
    _write(folder, stores, rows, packs, counts)


def fit(index: int, store: TokenStore, data: DataConfig) -> tuple[ChosenRows, Counter[str]]:
    """The rows of a store that can be trained, as ``CHOSEN`` with the store's ``index``, and what became of the others.

    Counts: rows; dropped_rows (over-long), unanswered_rows (nothing supervised left after truncation), truncated_rows,
    truncated_tokens, and those of the store.
    """
    counts: Counter[str] = Counter(store.meta["counts"])
    rows = np.zeros(len(store.rows), CHOSEN)
    rows["store"], rows["start"] = index, store.starts
    rows["length"], rows["supervised"] = store.rows["length"], store.rows["supervised"]
    is_long = rows["length"] > data.max_seq_len
    if data.over_length == "drop":
        rows = rows[~is_long]
        counts["dropped_rows"] = int(is_long.sum())
    elif data.over_length == "truncate" and is_long.any():
        before = rows["length"].copy()
        for row in np.flatnonzero(is_long):
            start = int(rows["start"][row])
            rows["supervised"][row] = store.supervised[start + 1 : start + data.max_seq_len].sum()
        rows["length"][is_long] = data.max_seq_len
        is_lost = is_long & (rows["supervised"] == 0)
        is_cut = is_long & ~is_lost
        counts["unanswered_rows"], counts["truncated_rows"] = int(is_lost.sum()), int(is_cut.sum())
        counts["truncated_tokens"] = int((before - data.max_seq_len)[is_cut].sum())
        rows = rows[~is_lost]
    counts["rows"] = len(rows)
    return rows, counts


def _refuse_long_rows(stores: Sequence[NamedStore], data: DataConfig, key: str) -> None:
    lengths = [named.store.rows["length"] for named in stores]
    number = sum(int((each > data.max_seq_len).sum()) for each in lengths)
    if not number:
        return
    index = next(index for index, each in enumerate(lengths) if (each > data.max_seq_len).any())
    first = stores[index].store.origin(int(np.argmax(lengths[index] > data.max_seq_len)))
    total, longest = sum(map(len, lengths)), max(int(each.max(initial=0)) for each in lengths)
    raise DataError(
        f"{key}: {number:,} of {total:,} rows {'has' if number == 1 else 'have'} more than "
        f"data.max_seq_len={data.max_seq_len} tokens, the longest {longest:,} (first: {first})",
        fix=f"raise data.max_seq_len to {longest}, or set data.over_length to truncate, split or drop",
    )


def _write(
    folder: Path, stores: Sequence[NamedStore], rows: ChosenRows, packs: Packs, counts: dict[str, Counter[str]]
) -> None:
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    arrays: dict[str, NDArray[Any]] = {ROWS: rows, PACK_ROWS: packs.rows, PACK_BOUNDS: packs.bounds}
    for name, array in arrays.items():
        np.save(building / name, array)
    meta = {
        "stores": [os.path.relpath(named.store.folder, folder) for named in stores],
        "sources": [named.name for named in stores],
        "counts": {name: dict(sorted(count.items())) for name, count in counts.items()},
        "digest": digest_of(arrays.values(), before=[named.store.meta["digest"] for named in stores]),
    }
    (building / META).write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")
    building.rename(folder)
