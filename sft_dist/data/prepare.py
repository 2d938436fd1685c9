"""From sources to prepared data: every source tokenised once, every set chosen and packed, in a cache (``cache``)."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sft_dist.config.data_schema import DataConfig, SourceConfig
from sft_dist.data.cache import Cache, row_settings, set_folder, source_names, sources_of, store_folder
from sft_dist.data.files import is_url
from sft_dist.data.fingerprint import Fingerprints
from sft_dist.data.mixing import Side
from sft_dist.data.prepared import META
from sft_dist.data.rejected import refuse_rejected
from sft_dist.data.selection import NamedStore, select
from sft_dist.data.token_store import TokenStore, is_complete
from sft_dist.data.tokenising import WHOLE, Shard, Work, alone, tokenise

# A worker takes seconds to start: sources with fewer bytes on disk are tokenised by the process itself.
MIN_BYTES_FOR_WORKERS = 4 << 20

# Of files that are read to find what was prepared of them: a second or two.
MAX_BYTES_READ = 2 << 30


class Display(Protocol):
    """What shows how far the preparation is."""

    def source(self, name: str, *, is_there: bool) -> Callable[[int, int], None]:
        """A source is begun, or found prepared; what is returned is called with rows and tokens that are done."""

    def say(self, line: str) -> None: ...


class Silent:
    def source(self, name: str, *, is_there: bool) -> Callable[[int, int], None]:
        return lambda rows, tokens: None

    def say(self, line: str) -> None:
        pass


@dataclass(frozen=True)
class Tokenised:
    """A source in a token store.

    Args:
        index: among the sources of its set.
    """

    index: int
    named: NamedStore
    work: Work


def tokenise_sources(
    data: DataConfig,
    cache: Cache,
    *,
    side: Side = "train",
    seed: int = 0,
    shard: Shard = WHOLE,
    display: Display | None = None,
) -> list[Tokenised] | None:
    """Tokenises the sources of one set, or finds them tokenised.

    Returns:
        None where shards of other machines are missing.

    Raises:
        DataError: a source cannot be read, or a row cannot be trained on.
    """
    sources = sources_of(data, side)
    names, works = source_names(sources), [_work(source, data, cache, seed) for source in sources]
    are_complete = [
        _tokenise(work, name, cache, shard, display or Silent()) for work, name in zip(works, names, strict=True)
    ]
    if not all(are_complete):
        return None
    stores = [TokenStore.open(work.folder) for work in works]
    if data.on_bad_row == "error":
        _refuse_rejected(stores)
    return [
        Tokenised(index, NamedStore(name, store), work)
        for index, (name, store, work) in enumerate(zip(names, stores, works, strict=True))
    ]


def prepare_set(
    data: DataConfig,
    cache: Cache,
    *,
    side: Side = "train",
    seed: int = 0,
    shard: Shard = WHOLE,
    display: Display | None = None,
) -> Path | None:
    """Prepares one set, or finds it prepared.

    Args:
        side: rows that are trained, or those that are evaluated.
        seed: of what is drawn.
        shard: what this machine does of it.

    Returns:
        the folder for ``open_prepared``; None where shards of other machines are missing.

    Raises:
        DataError: a source cannot be read, a row cannot be trained on, or nothing is left.
    """
    display = display or Silent()
    tokenised = tokenise_sources(data, cache, side=side, seed=seed, shard=shard, display=display)
    if tokenised is None:
        return None
    sources = sources_of(data, side)
    folder = set_folder([each.work.folder.name for each in tokenised], sources, data, cache, side, seed)
    with alone(folder, "select", display.say):
        if not (folder / META).exists():
            stores = [each.named for each in tokenised]
            select(stores, sources, data, folder, key=f"data.{side}", side=side, seed=seed)
    return folder


def find_set(data: DataConfig, cache: Cache, *, side: Side = "train", seed: int = 0) -> Path | None:
    """The folder of a set as ``prepare_set`` would return it, if it is there and complete; else None.

    Reads only, and without network: nothing is tokenised, written or locked. Files that the cache has not seen as they
    are now are read for their digest if they are small enough (``MAX_BYTES_READ``).

    Raises:
        DataError: rows of it were rejected, and ``data.on_bad_row`` is ``error``.
    """
    if not (cache.folder / "sets").is_dir():
        return None
    sources, fingerprints = sources_of(data, side), Fingerprints(cache.folder / "files.json")
    stores: list[Path] = []
    for source in sources:
        found = fingerprints.remembered(source, most_bytes=MAX_BYTES_READ)
        if found is None:
            return None
        stores.append(store_folder(source, *found, row_settings(source, data, seed), cache))
    folder = set_folder([store.name for store in stores], sources, data, cache, side, seed)
    if not (folder / META).is_file() or not all(map(is_complete, stores)):
        return None
    if data.on_bad_row == "error":
        _refuse_rejected(map(TokenStore.open, stores))
    return folder


def _refuse_rejected(stores: Iterable[TokenStore]) -> None:
    for store in stores:
        refuse_rejected(store.meta["counts"].get("rejected_rows", 0), store.meta["rejected"])


@dataclass(frozen=True)
class PreparedSets:
    """Folders for ``open_prepared``; None: there is no such set, or not yet."""

    train: Path | None
    eval: Path | None


def prepare_sets(
    data: DataConfig, cache: Cache, *, seed: int = 0, shard: Shard = WHOLE, display: Display | None = None
) -> PreparedSets:
    """Prepares training and evaluation data. Raises ``DataError``, as ``prepare_set``."""
    train = prepare_set(data, cache, seed=seed, shard=shard, display=display)
    if not sources_of(data, "eval"):
        return PreparedSets(train, None)
    return PreparedSets(train, prepare_set(data, cache, side="eval", seed=seed, shard=shard, display=display))


def counts_of(folder: Path) -> dict[str, Counter[str]]:
    """What became of the rows of each source of a prepared set; see ``selection.fit``."""
    counts = json.loads((folder / META).read_text(encoding="utf-8"))["counts"]
    return {name: Counter(count) for name, count in counts.items()}


def rejected_of(folder: Path) -> list[str]:
    """What is wrong with the first rows that were left out of the sources of a prepared set."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    stores = [TokenStore.open(folder / place) for place in meta["stores"]]
    return [what for store in stores for what in store.meta["rejected"]]


def _work(source: SourceConfig, data: DataConfig, cache: Cache, seed: int) -> Work:
    fingerprints = Fingerprints(cache.folder / "files.json")
    files = fingerprints.files_of(source)
    rows = row_settings(source, data, seed)
    return Work(
        source=source,
        files=files,
        settings=rows,
        load=cache.load,
        folder=store_folder(source, files, fingerprints.of(files), rows, cache),
        about={},
    )


def _tokenise(work: Work, name: str, cache: Cache, shard: Shard, display: Display) -> bool:
    is_there = is_complete(work.folder)
    on_progress = display.source(name, is_there=is_there)
    if is_there:
        return True
    workers = cache.num_workers if cache.num_workers is not None else _usable_cpus()
    if _bytes(work.files) < MIN_BYTES_FOR_WORKERS or workers == 1:
        workers = 0
    return tokenise(work, cache.renderer, num_workers=workers, shard=shard, on_progress=on_progress, say=display.say)


def _usable_cpus() -> int:
    """CPUs that this process may run on, as SLURM and containers give them, where the system tells."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _bytes(files: Sequence[str]) -> int:
    return sum(MIN_BYTES_FOR_WORKERS if is_url(name) else os.path.getsize(name) for name in files)
