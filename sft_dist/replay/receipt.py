"""The receipt of a run that is to be repeated, and the configuration of the repetition. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_dist.config.flat import flat
from sft_dist.config.load import read_config
from sft_dist.config.schema import Config
from sft_dist.config.secrets import HIDDEN, without_secrets
from sft_dist.config.text import read_yaml
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError
from sft_dist.export.provenance import RECEIPT

# Newest format of a receipt that is understood here; the first that can be repeated.
KNOWN, FIRST = 2, 2

# Of a receipt, and what each is in words.
NEEDED = {
    "settings": "the settings of the run",
    "inputs": "digests of what it read",
    "identity": "what its steps learn",
    "versions": "versions",
    "code": "the code of this project",
    "topology": "where it ran",
    "machine": "the machine",
    "environment": "the environment",
    "sessions": "its sessions",
}

# Of settings: what a repetition has for itself unless it is told otherwise. No copies over those of the run.
OWN_SETTINGS = ("logging.wandb.mode=disabled", "logging.tensorboard=false", "checkpoint.mirror=null")

# Settings that have no say in what a run learns, so that a hidden one does no harm.
NO_MATTER = ("output_dir", "logging.", "cluster.", "hardware.", "checkpoint.mirror", "watchdog.")


@dataclass(frozen=True)
class Recorded:
    """
    Args:
        path: of the receipt; folder: that it lies in, with or without the rest of the run.
        content: of the receipt, with all of ``NEEDED``.
    """

    path: Path
    folder: Path
    content: dict[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.content.get("finished"))


def read_recorded(given: Path) -> Recorded:
    """
    Args:
        given: a receipt, or the run directory that has it.

    Raises:
        ConfigError: there is none, or it does not hold what a repetition needs.
    """
    path = given / RECEIPT if given.is_dir() else given
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{path} cannot be read: {why}", fix="give a run's receipt.json, or its output_dir") from None
    except ValueError:
        content = None
    number = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(number, int):
        raise ConfigError(f"{path} is no receipt of a run", fix="give a run's receipt.json, or its output_dir")
    if number > KNOWN:
        raise ConfigError(
            f"{path} is of format {number}, which this version does not know", fix="use the version that wrote it"
        )
    missing = [words for key, words in NEEDED.items() if content.get(key) is None]
    if missing:
        unread = content.get("inputs_unread")
        why = f" ({unread})" if unread else f" (format {number}; from {FIRST} on receipts have them)"
        raise ConfigError(
            f"{path} cannot be repeated, it lacks: {', '.join(missing)}{'' if number >= FIRST and not unread else why}",
            fix="train its config.yaml into another output_dir, and see `sft-dist diff`",
        )
    first = content["sessions"][0]["first_step"] if content["sessions"] else 1
    if first > 1:
        raise ConfigError(
            f"{path}: the run went on from a checkpoint of another one, at step {first:,}, which it does not have",
            fix="repeat the other run, or `sft-dist train CONFIG --resume PATH` from that checkpoint",
        )
    return Recorded(path, path.parent, content)


def config_of_replay(recorded: Recorded, overrides: Sequence[str], out: Path) -> Config:
    """The configuration of the repetition.

    Raises:
        ConfigError: it is wrong with the overrides; or a value that matters is hidden in the receipt, and neither the
            overrides nor the run's own ``config.yaml`` beside it have it.
    """
    settings = _with_secrets(recorded)
    texts = [*OWN_SETTINGS, *overrides, f"output_dir={json.dumps(str(out))}"]
    source = str(recorded.path)
    config = read_config(deepcopy(settings), source=source, overrides=texts)
    hidden = [
        key
        for key, value in flat(config.model_dump(mode="json"))
        if HIDDEN in str(value) and not key.startswith(NO_MATTER)
    ]
    if hidden:
        raise ConfigError(
            f"{source}: {', '.join(hidden)} {'is' if len(hidden) == 1 else 'are'} hidden in it",
            fix=f"say {' '.join(f'{key}=VALUE' for key in hidden)}, or keep the run's config.yaml beside the receipt",
        )
    validate(config, source=source)
    return config


def _with_secrets(recorded: Recorded) -> dict[str, Any]:
    """The settings of the receipt, from the run's ``config.yaml`` where that is of this run."""
    settings: dict[str, Any] = recorded.content["settings"]
    try:
        own = read_yaml((recorded.folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return settings
    return own if isinstance(own, dict) and without_secrets(own) == settings else settings
