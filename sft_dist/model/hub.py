"""Models of the Hugging Face hub in the local hub cache: where they lie, and what of them is there.

A run never asks the hub: on hundreds of ranks that would be hundreds of requests, and compute nodes often have no way
out. ``hub_fetch`` brings them. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model.known import is_stand_in, known_model, stand_in

Part = Literal["config", "tokenizer", "weights"]

CONFIG_FILE, WEIGHTS = "config.json", "model.safetensors"


class ModelNotHere(ConfigError):
    """The model, or the part of it that is needed, is not on this machine."""


def is_folder_path(path: str) -> bool:
    """Whether ``model.path`` can only mean a folder, existing or not."""
    return path.startswith(("/", "./", "../", "~"))


def can_be_id(path: str) -> bool:
    """Whether it is of a form that the hub gives its models."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not is_folder_path(path)


def model_folder(path: str, revision: str | None, part: Part = "weights") -> Path:
    """Where a model lies on this machine; asks no network.

    Within ``known_models_allowed`` a known model that is not here gets a folder with nothing but its ``config.json``.

    Args:
        path: a folder in Hugging Face layout, returned as it is, or a hub id.
        revision: branch, tag or commit of a hub id.
        part: what must be there of a hub id, whose snapshot may have been fetched in part.

    Raises:
        ModelNotHere: there is no such folder, or the hub cache lacks the model, or the part.
        ModelNotKnown: within ``known_models_allowed``, the configuration is not here and not known either.
        ConfigError: the path is neither a folder nor a hub id.
    """
    if Path(path).is_dir():
        return Path(path)
    if is_folder_path(path):
        raise ModelNotHere(f"model.path: the folder {path} does not exist", fix="give an existing folder or a hub id")
    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True, allow_patterns=CONFIG_FILE))
        missing = _missing(folder, part)
    except HFValidationError:
        raise not_an_id(path) from None
    except LocalEntryNotFoundError:
        missing = "nothing of it"
    if missing is not None:
        what = f"{missing} is there" if missing == "nothing of it" else f"{missing} is missing"
        why = f"model.path: {named(path, revision)} is not in the local hub cache {constants.HF_HUB_CACHE} ({what})"
        known = stand_in(path, why) if part == "config" else None
        if known is None:
            raise ModelNotHere(why, fix=f"sft-dist model fetch CONFIG{_folder_like(path)}")
        folder = known
    return folder


def config_source(path: str, revision: str | None) -> str | None:
    """What the table of known models says in place of the ``config.json``; None where that is on this machine.

    Raises:
        ModelNotHere, ModelNotKnown, ConfigError: as ``model_folder``.
    """
    if not is_stand_in(model_folder(path, revision, "config")):
        return None
    model = known_model(path)
    assert model is not None
    unread = f"; revision {revision} was not looked at" if revision else ""
    return f"the table of known models ({model.source}{unread})"


def _folder_like(path: str) -> str:
    """A hint at a folder that the user may have meant by what can be a hub id too."""
    around = Path(path).parent
    folders = [entry.name for entry in around.iterdir() if entry.is_dir()] if around.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, folders, n=1)
    if near:
        return f"; or did you mean the folder {around / near[0]}?"
    return f"; or correct the name: the folder {around} has no {Path(path).name}" if path.count("/") and folders else ""


def _missing(folder: Path, part: Part) -> str | None:
    """The first file that the part needs and the snapshot lacks; a link to a lost file counts as lost."""
    if part == "config":
        needed = ["config.json"]
    elif part == "tokenizer":
        needed = ["tokenizer_config.json"]
        if not (folder / needed[0]).is_file() and (folder / "tokenizer.json").is_file():
            needed = []
    else:
        needed = weight_files(folder) or [WEIGHTS]
    return next((name for name in needed if not (folder / name).is_file()), None)


def weight_files(folder: Path, name: str = "model", *, key: str = "model.path") -> list[str]:
    """Names of the files that make up a model: ``NAME.safetensors``, or the shards that its index lists; none without.

    The single file comes first where there is both, as for Transformers: an index may be a leftover.

    Args:
        key: of the configuration, for messages.

    Raises:
        CheckpointError: the index is damaged.
    """
    single = f"{name}.safetensors"
    index = folder / f"{single}.index.json"
    if (folder / single).is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        return sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise CheckpointError(
            f"{key}: {index} is not an index of safetensors files",
            fix="take the index that belongs to the shards, or fetch the model again",
        ) from e


def not_an_id(path: str) -> ConfigError:
    """The error for a ``model.path`` that can mean nothing."""
    return ModelNotHere(
        f"model.path: {path} is neither a model folder nor a hub id", fix="give an existing folder or ORGANISATION/NAME"
    )


def named(path: str, revision: str | None) -> str:
    """A hub id as people read it."""
    return path if revision is None else f"{path} (revision {revision})"
