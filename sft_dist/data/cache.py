"""Where prepared data is kept, and by which keys.

    CACHE/files.json                 digests of the files that were seen
    CACHE/tokens/KEY/                the rows of one source as tokens (``token_store``)
    CACHE/sets/KEY/                  the rows of one set, chosen and packed (``prepared``)

A key is a digest of all that the folder's content follows from, and of nothing else: of the content of the files, of
the tokenizer, the template and the settings that tokenising reads; a set's, of the keys of its sources and of the
settings that choose and pack. What another run has prepared in the same cache is used.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sft_dist.config.data_schema import DataConfig, SourceConfig
from sft_dist.data.chunk import RowSettings
from sft_dist.data.files import ending
from sft_dist.data.mixing import Side
from sft_dist.data.supervision import Supervision
from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from sft_dist.data.chat_template import ChatRenderer

# Raise it when the same sources and settings begin to give other tokens or files.
FORMAT = 1


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


def sources_of(data: DataConfig, side: Side) -> Sequence[SourceConfig]:
    """What the rows of a set are from."""
    return data.train if side == "train" or data.eval_split is not None else data.eval


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """What each source is called in reports: its name or path, made unique."""
    seen: Counter[str] = Counter()
    names = []
    for source in sources:
        name = source.name or source.path
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def row_settings(source: SourceConfig, data: DataConfig, seed: int) -> RowSettings:
    """How the rows of a source become tokens."""
    return RowSettings(
        supervision=Supervision(data.train_on, data.train_reasoning, data.train_tool_calls),
        split_at=data.max_seq_len if data.over_length == "split" else None,
        templates=tuple(source.templates),
        seed=seed if source.templates else 0,
        skips_bad_rows=data.on_bad_row == "skip",
    )


def store_folder(
    source: SourceConfig, files: Sequence[str], digests: Sequence[str], rows: RowSettings, cache: Cache
) -> Path:
    """Of the rows of one source as tokens.

    Args:
        digests: of ``files``, one each.
    """
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


def set_folder(
    stores: Sequence[str], sources: Sequence[SourceConfig], data: DataConfig, cache: Cache, side: Side, seed: int
) -> Path:
    """Of the rows of one set, chosen and packed.

    Args:
        stores: names of its sources' folders.
    """
    settings = {
        "format": FORMAT,
        "stores": list(stores),
        "names": source_names(sources),
        "side": side,
        **{name: getattr(data, name) for name in ("max_seq_len", "over_length", "packing", "packing_window")},
        **_drawing(sources, data, side, seed),
    }
    return cache.folder / "sets" / _digest(settings)


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


def _digest(settings: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())
