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

from sft_dist.config.data_schema import DataConfig, SourceConfig
from sft_dist.data.mixing import Side, is_held_out, repeated, weights_of
from sft_dist.data.packing import Packs, pack_best_fit, pack_in_windows
from sft_dist.data.prepared import CHOSEN, META, PACK_BOUNDS, PACK_ROWS, ROWS, ChosenRows, digest_of
from sft_dist.data.token_store import TokenStore
from sft_dist.errors import DataError

Counts = dict[str, Counter[str]]
"""What became of the rows of each source, by its name."""


@dataclass(frozen=True)
class NamedStore:
    """A source's rows under the name by which the source is reported."""

    name: str
    store: TokenStore


@dataclass(frozen=True)
class Selection:
    """What one set has: rows of its stores, in packs, and what became of the others."""

    rows: ChosenRows
    packs: Packs
    counts: Counts


def select(
    stores: Sequence[NamedStore],
    sources: Sequence[SourceConfig],
    data: DataConfig,
    folder: Path,
    *,
    key: str,
    side: Side,
    seed: int,
) -> None:
    """Writes what ``choose_rows`` chooses into ``folder``, which appears when it is complete."""
    chosen = choose_rows(stores, sources, data, key=key, side=side, seed=seed)
    _write(folder, stores, chosen.rows, chosen.packs, chosen.counts)


def choose_rows(
    stores: Sequence[NamedStore],
    sources: Sequence[SourceConfig],
    data: DataConfig,
    *,
    key: str,
    side: Side,
    seed: int,
) -> Selection:
    """Chooses and packs the rows of one set.

    Training packs mix the sources; evaluation packs have rows of one each, so that its loss is known.

    Args:
        key: of the configuration, for messages (``data.train``).
        side: rows that are trained, or those that are evaluated.
        seed: of what is drawn.

    Raises:
        DataError: a row is over-long under ``over_length: error``, or nothing is left.
    """
    if data.over_length == "error":
        refuse_long_rows(stores, data, key)
    chosen, counts = [], {}
    for index, named in enumerate(stores):
        of_side = rows_of_side(index, named.store, data, side=side, seed=seed)
        rows, counts[named.name] = fit(index, named.store, data, of_side)
        chosen.append(rows)
    num_left = sum(map(len, chosen))
    if side == "train":
        chosen = mix(chosen, sources, data, seed, counts)
    rows = np.concatenate(chosen)
    if num_left and not len(rows):
        weights = ", ".join(f"{named.name}: {source.weight:g}" for named, source in zip(stores, sources, strict=True))
        raise DataError(
            f"{key}: the weights draw none of {num_left:,} rows ({weights})", fix="raise the weight of a source"
        )
    if not len(rows) and data.eval_split is not None and side == "eval":
        raise DataError(
            f"data.eval_split: no row is held out by a share of {data.eval_split.share}",
            fix="raise data.eval_split.share",
        )
    if not len(rows):
        raise DataError(
            f"{key}: none of {sum(count['dropped_rows'] + count['unanswered_rows'] for count in counts.values())} rows "
            f"is left after data.over_length={data.over_length}",
            fix=f"raise data.max_seq_len above {data.max_seq_len}, or shorten the prompts",
        )
    packs = pack(rows, data) if side == "train" else _pack_apart(chosen, data)
    return Selection(rows, packs, counts)


def rows_of_side(index: int, store: TokenStore, data: DataConfig, *, side: Side, seed: int) -> NDArray[np.bool_] | None:
    """[rows] which rows of a store are on ``side``; None: all."""
    if data.eval_split is None:
        return None
    held_out = is_held_out(store.rows["prompt"], data.eval_split, seed=seed, source=index)
    return held_out if side == "eval" else ~held_out


def mix(
    chosen: list[ChosenRows], sources: Sequence[SourceConfig], data: DataConfig, seed: int, counts: Counts
) -> list[ChosenRows]:
    """The rows of each source as often as they are seen in an epoch.

    Args:
        counts: by source, in their order; gets ``seen_rows``.

    Raises:
        DataError: a source with a share has no row.
    """
    sizes = [
        rows["length"].astype(np.int64) if data.mix_by == "tokens" else np.ones(len(rows), np.int64) for rows in chosen
    ]
    for source, each in zip(sources, sizes, strict=True):
        if source.share is not None and not len(each):
            raise DataError(f"{source.path} has a share and no row is left of it", fix="remove the source")
    weights = weights_of(sources, [int(each.sum()) for each in sizes])
    mixed = []
    for index, (rows, weight) in enumerate(zip(chosen, weights, strict=True)):
        seen = rows if weight == 1 else rows[repeated(sizes[index], weight, seed=seed, source=index)]
        list(counts.values())[index]["seen_rows"] = len(seen)
        mixed.append(seen)
    return mixed


def pack(rows: ChosenRows, data: DataConfig) -> Packs:
    """The rows of each sequence, as ``data.packing`` says."""
    if data.packing == "none":
        return Packs.single(len(rows))
    lengths = rows["length"].astype(np.int64)
    if data.packing_window is not None:
        return pack_in_windows(lengths, data.max_seq_len, window=data.packing_window)
    return pack_best_fit(lengths, data.max_seq_len)


def _pack_apart(chosen: Sequence[ChosenRows], data: DataConfig) -> Packs:
    """Packs of rows of one source each, source after source."""
    packs: list[NDArray[np.int64]] = []
    before = 0
    for rows in chosen:
        packs += [pack + before for pack in pack(rows, data)] if len(rows) else []
        before += len(rows)
    return Packs.of(packs)


def fit(
    index: int, store: TokenStore, data: DataConfig, of_side: NDArray[np.bool_] | None = None
) -> tuple[ChosenRows, Counter[str]]:
    """The rows of a store that can be trained, as ``CHOSEN`` with the store's ``index``, and what became of the others.

    Args:
        of_side: [rows] which of them are asked for; None: all.

    Counts: rows; dropped_rows (over-long), unanswered_rows (nothing supervised left after truncation), truncated_rows,
    truncated_tokens, and those of the store.
    """
    counts: Counter[str] = Counter(store.meta["counts"])
    rows = np.zeros(len(store.rows), CHOSEN)
    rows["store"], rows["start"] = index, store.starts
    rows["length"], rows["supervised"] = store.rows["length"], store.rows["supervised"]
    if of_side is not None:
        rows = rows[of_side]
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


def refuse_long_rows(stores: Sequence[NamedStore], data: DataConfig, key: str) -> None:
    """Raises ``DataError`` if a row has more than ``data.max_seq_len`` tokens."""
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


def _write(folder: Path, stores: Sequence[NamedStore], rows: ChosenRows, packs: Packs, counts: Counts) -> None:
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
