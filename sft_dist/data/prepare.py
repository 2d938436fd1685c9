"""From sources to prepared data: every source tokenised once, every set chosen and packed, all in a cache on disk.

    CACHE/files.json                 digests of the files that were seen
    CACHE/tokens/KEY/                the rows of one source as tokens (``token_store``)
    CACHE/sets/KEY/                  the rows of one set, chosen and packed (``prepared``)

A key is a digest of all that the folder's content follows from, and of nothing else: of the content of the files, of
the tokenizer, the template and the settings that tokenising reads; a set's, of the keys of its sources and of the
settings that choose and pack. What another run has prepared in the same cache is used.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from sft_dist.config.data_schema import DataConfig, SourceConfig
from sft_dist.data.chunk import RowSettings
from sft_dist.data.files import ending, is_url
from sft_dist.data.fingerprint import Fingerprints
from sft_dist.data.mixing import Side
from sft_dist.data.prepared import META
from sft_dist.data.rejected import refuse_rejected
from sft_dist.data.selection import NamedStore, select
from sft_dist.data.supervision import Supervision
from sft_dist.data.token_store import TokenStore, is_complete
from sft_dist.data.tokenising import WHOLE, Shard, Work, alone, tokenise
from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from sft_dist.data.chat_template import ChatRenderer

# Raise it when the same sources and settings begin to give other tokens or files.
FORMAT = 1

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
class Cache:
    """Where prepared data is kept, and what makes it.

    Args:
        renderer: of this process.
        load: makes the same renderer in another one.
        num_workers: processes that tokenise a large source; None: as many as this process may use CPUs.
    """

    folder: Path
    renderer: ChatRenderer
    load: Callable[[], ChatRenderer]
    num_workers: int | None = None


@dataclass(frozen=True)
class Tokenised:
    """A source in a token store.

    Args:
        index: among the sources of its set.
    """

    index: int
    named: NamedStore
    work: Work


def sources_of(data: DataConfig, side: Side) -> Sequence[SourceConfig]:
    """What the rows of a set are from."""
    return data.train if side == "train" or data.eval_split is not None else data.eval


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
    folder = _set_folder([each.work.folder.name for each in tokenised], sources, data, cache, side, seed)
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
        stores.append(_store_folder(source, *found, row_settings(source, data, seed), cache))
    folder = _set_folder([store.name for store in stores], sources, data, cache, side, seed)
    if not (folder / META).is_file() or not all(map(is_complete, stores)):
        return None
    if data.on_bad_row == "error":
        _refuse_rejected(map(TokenStore.open, stores))
    return folder


def _set_folder(
    stores: Sequence[str], sources: Sequence[SourceConfig], data: DataConfig, cache: Cache, side: Side, seed: int
) -> Path:
    settings = {
        "format": FORMAT,
        "stores": list(stores),
        "names": source_names(sources),
        "side": side,
        **{name: getattr(data, name) for name in ("max_seq_len", "over_length", "packing", "packing_window")},
        **_drawing(sources, data, side, seed),
    }
    return cache.folder / "sets" / _digest(settings)


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


def _drawing(sources: Sequence[SourceConfig], data: DataConfig, side: Side, seed: int) -> dict[str, Any]:
    """What decides which rows are drawn; the seed only where something is."""
    split = data.eval_split
    mixed = side == "train" and any(source.share is not None or source.weight % 1 for source in sources)
    return {
        "weights": [(source.weight, source.share) for source in sources] if side == "train" else [],
        "mix_by": data.mix_by if mixed else "",
        "eval_split": None if split is None else split.model_dump(),
        "seed": seed if mixed or (split is not None and split.by == "row") else None,
    }


def cache_path(data: DataConfig, output_dir: str) -> Path:
    """The folder that ``cache_folder`` makes; looks at nothing."""
    beside = Path(output_dir).absolute().parent / "data_cache"
    return beside if data.cache_dir is None else Path(data.cache_dir).expanduser()


def cache_folder(data: DataConfig, output_dir: str) -> Path:
    """Where a run keeps its prepared data: beside its run directory, if the configuration does not say.

    Raises:
        ConfigError: nothing can be written there.
    """
    folder = cache_path(data, output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(
            f"data.cache_dir: {folder} cannot be written ({e.strerror or e})",
            fix="set data.cache_dir to a folder that you may write, and that all nodes see",
        ) from e
    return folder


def counts_of(folder: Path) -> dict[str, Counter[str]]:
    """What became of the rows of each source of a prepared set; see ``selection.fit``."""
    counts = json.loads((folder / META).read_text(encoding="utf-8"))["counts"]
    return {name: Counter(count) for name, count in counts.items()}


def rejected_of(folder: Path) -> list[str]:
    """What is wrong with the first rows that were left out of the sources of a prepared set."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    stores = [TokenStore.open(folder / place) for place in meta["stores"]]
    return [what for store in stores for what in store.meta["rejected"]]


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """What each source is called in reports: its name or path, made unique."""
    seen: Counter[str] = Counter()
    names = []
    for source in sources:
        name = source.name or source.path
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _work(source: SourceConfig, data: DataConfig, cache: Cache, seed: int) -> Work:
    fingerprints = Fingerprints(cache.folder / "files.json")
    files = fingerprints.files_of(source)
    rows = row_settings(source, data, seed)
    return Work(
        source=source,
        files=files,
        settings=rows,
        load=cache.load,
        folder=_store_folder(source, files, fingerprints.of(files), rows, cache),
        about={},
    )


def row_settings(source: SourceConfig, data: DataConfig, seed: int) -> RowSettings:
    """How the rows of a source become tokens."""
    return RowSettings(
        supervision=Supervision(data.train_on, data.train_reasoning, data.train_tool_calls),
        split_at=data.max_seq_len if data.over_length == "split" else None,
        templates=tuple(source.templates),
        seed=seed if source.templates else 0,
        skips_bad_rows=data.on_bad_row == "skip",
    )


def _store_folder(
    source: SourceConfig, files: Sequence[str], digests: Sequence[str], rows: RowSettings, cache: Cache
) -> Path:
    settings = {
        "format": FORMAT,
        "files": list(digests),
        "endings": [ending(name) for name in files],  # which say what tables and plain texts are
        "layout": source.format,
        "columns": source.columns,
        "renderer": cache.renderer.fingerprint,
        # Whoever skips bad rows makes the same store where there is none, and whoever does not looks for them in it.
        "rows": {name: value for name, value in asdict(rows).items() if name != "skips_bad_rows"},
    }
    return cache.folder / "tokens" / _digest(settings)


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


def _digest(settings: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())
