"""Reads the YAML tables beside this module: once a process, with the keys checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sft_dist.errors import ConfigError

# libyaml's loader where PyYAML was built with it: ten times as fast.
_Loader: type[yaml.SafeLoader] | type[yaml.CSafeLoader] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


@cache
def shipped_table(name: str) -> dict[str, Any]:
    """The table of that file name; not to be changed by who reads it."""
    text = files("sft_dist.hardware").joinpath(name).read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, Loader=_Loader)
    return table


def user_table(path: str) -> dict[str, Any]:
    """A table that the user wrote.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds no keys.
    """
    try:
        table = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"hardware.prices: {path}: no such file", fix="give an existing YAML file, or null") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hardware.prices: {path} cannot be read: {error}", fix="make it a readable file") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"hardware.prices: {path} is not YAML: {' '.join(str(error).split())}", fix="correct it there"
        ) from None
    if not isinstance(table, dict):
        raise ConfigError(f"hardware.prices: {path} holds no keys", fix="write prices: [...] and what else it has")
    return table


def check_keys(row: Mapping[str, Any], *, allowed: Iterable[str], required: Iterable[str], place: str) -> None:
    """Raises a ConfigError for a key that is unknown or missing in a row of a table.

    Args:
        place: where the row is, for the message.
    """
    known = list(allowed)
    for key in row:
        if key not in known:
            raise ConfigError(f"{place}: {key} is not a key", fix=f"{did_you_mean(str(key), known)}")
    for key in required:
        if key not in row:
            raise ConfigError(f"{place}: {key} is missing", fix=f"add {key}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint: the nearest names, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"use one of: {', '.join(names)}"
