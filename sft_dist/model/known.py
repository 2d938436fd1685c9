"""Models whose architecture is known without their files: for the dry run, which needs neither weights nor a network.

``known_models.yaml`` holds, by hub id, the keys of ``config.json`` that decide shapes and FLOPs. Only within
``known_models_allowed`` does a model that is not on this machine get its configuration from there; training never
enters it. Imports no torch.
"""

from __future__ import annotations

import copy
import difflib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sft_dist.errors import PlanError

# Where configurations of known models are written, while they are allowed. Threads that are started within do not
# inherit it.
_stand_ins: ContextVar[Path | None] = ContextVar("sft_dist_known_models", default=None)


class ModelNotKnown(PlanError):
    """The model is neither on this machine nor in the table: a mistake of usage."""

    exit_code = 2


@dataclass(frozen=True)
class KnownModel:
    """An entry of the table.

    Args:
        ids: hub repositories of this architecture.
        num_parameters: of the whole model, tied weights counted once.
        source: where the configuration is from.
        config: keys of ``config.json``.
    """

    ids: tuple[str, ...]
    num_parameters: int
    source: str
    config: Mapping[str, Any]


@cache
def table() -> tuple[KnownModel, ...]:
    """Every entry of ``known_models.yaml``, in its order."""
    text = resources.files("sft_dist.model").joinpath("known_models.yaml").read_text(encoding="utf-8")
    return tuple(
        KnownModel(
            ids=tuple(entry["ids"]),
            num_parameters=entry["num_parameters"],
            source=entry.get("source", f"config.json of {entry['ids'][0]}"),
            config=entry["config"],
        )
        for entry in yaml.safe_load(text)["models"]
    )


def known_models() -> tuple[str, ...]:
    """Every hub id of the table."""
    return tuple(name for model in table() for name in model.ids)


def known_model(path: str) -> KnownModel | None:
    """The entry of a hub id, or of a name without organisation whose ids all share one; upper and lower case are alike.

    None where there is none.
    """
    by_id, by_name = _index()
    found = by_id.get(path.lower())
    if found is None:
        candidates = by_name.get(path.lower(), ())
        found = candidates[0] if len(candidates) == 1 else None
    return found


@cache
def _index() -> tuple[dict[str, KnownModel], dict[str, tuple[KnownModel, ...]]]:
    by_id = {name.lower(): model for model in table() for name in model.ids}
    by_name: dict[str, tuple[KnownModel, ...]] = {}
    for model in table():
        for name in {_bare(name) for name in model.ids}:
            by_name[name] = (*by_name.get(name, ()), model)
    return by_id, by_name


def _bare(path: str) -> str:
    return path.rpartition("/")[2].lower()


def known_config(path: str) -> dict[str, Any] | None:
    """The keys of a model's ``config.json`` that decide shapes and FLOPs; None where the model is not known.

    Args:
        path: as for ``known_model``.
    """
    model = known_model(path)
    return None if model is None else copy.deepcopy(dict(model.config))


def nearest_models(path: str) -> list[str]:
    """Up to three ids of the table that resemble a path, the nearest first; none where nothing does."""
    wanted, bare = path.lower(), _bare(path)
    alike = {name: max(_likeness(wanted, name.lower()), _likeness(bare, _bare(name))) for name in known_models()}
    near = sorted((name for name in alike if alike[name] >= 0.6), key=lambda name: -alike[name])
    return near[:3]


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


@contextmanager
def known_models_allowed() -> Iterator[None]:
    """Within it a hub model that is not on this machine is described by the table.

    A folder, and what is in the hub cache, always goes before the table. Tokenizers and weights are not in it.
    """
    with tempfile.TemporaryDirectory(prefix="sft-dist-known-") as folder:
        before = _stand_ins.set(Path(folder))
        try:
            yield
        finally:
            _stand_ins.reset(before)


def stand_in(path: str, why: str) -> Path | None:
    """A folder with the ``config.json`` of a known model; None where the table may not be used.

    Args:
        path: a hub id that is not on this machine.
        why: what is missing, for the message.

    Raises:
        ModelNotKnown: the table may be used and lacks the model.
    """
    parent = _stand_ins.get()
    if parent is None:
        return None
    config = known_config(path)
    if config is None:
        near = nearest_models(path)
        nearest = f" (nearest: {', '.join(near)})" if near else ""
        raise ModelNotKnown(
            f"{why}, nor is it among the known models{nearest}",
            fix=f"{'correct the id, or ' if near else ''}bring it here: sft-dist model fetch CONFIG --no-weights",
        )
    folder = parent / path.lower().replace("/", "--")
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def is_stand_in(folder: Path) -> bool:
    """Whether a folder is one that ``stand_in`` made."""
    parent = _stand_ins.get()
    return parent is not None and folder.parent == parent
