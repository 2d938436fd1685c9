"""From what was filled in on a page to the arguments of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlencode

from sft_dist.errors import ConfigError
from sft_dist.ui.places import Places
from sft_dist.ui.tasks import HTML, JSON

Kind = Literal["plan", "audit", "show"]

# How rows are chosen, and the option that says so.
CHOICES = {"first": "the first", "random": "drawn at random", "longest": "the longest",
           "least-supervised": "with the fewest trained tokens"}  # fmt: skip
SETS = ("train", "eval")

# Fields of a form whose values are kept when it is shown again.
FIELDS = ("config", "overrides", "gpu", "gpus", "nodes", "search", "set", "choice", "rows", "tokens")


@dataclass(frozen=True)
class Wanted:
    """
    Args:
        config: the file. arguments: of ``sft-dist``, without where the result goes.
    """

    kind: Kind
    config: Path
    arguments: tuple[str, ...]

    def with_result_in(self, folder: Path) -> list[str]:
        result = ["--html", str(folder / HTML)]
        return [*self.arguments, *result, *(["--json", str(folder / JSON)] if self.kind == "audit" else [])]


def wanted(kind: Kind, given: Mapping[str, str], places: Places) -> Wanted:
    """
    Args:
        given: the fields of a form by name.

    Raises:
        ConfigError: a field cannot be what it says.
        Refused: the configuration is not among the files that may be named.
    """
    if not given.get("config"):
        raise ConfigError("no configuration is chosen", fix="choose one")
    path = places.find(given["config"])
    if not path.is_file():
        raise ConfigError(f"{given['config']} is no file", fix="choose the YAML file of a run")
    options = _plan_options(given) if kind == "plan" else _show_options(given) if kind == "show" else []
    command = ["plan"] if kind == "plan" else ["data", kind]
    return Wanted(kind, path, (*command, as_argument(path), *_overrides(given.get("overrides", "")), *options))


def as_argument(path: Path) -> str:
    """A path as one would type it here: from the current folder on where it lies below that."""
    here = Path.cwd().resolve()
    if not path.is_relative_to(here):
        return str(path)
    name = os.path.relpath(path, here)
    return f"./{name}" if name.startswith("-") else name


def _overrides(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        # An option would be more than the page has a field for.
        if "=" not in line or line.startswith("-"):
            raise ConfigError(f"{line!r} changes no key", fix="write KEY.PATH=VALUE, one in each line")
    return lines


def _number(given: Mapping[str, str], name: str, what: str) -> str | None:
    text = given.get(name, "").strip()
    if text and not (text.isascii() and text.isdecimal() and int(text)):
        raise ConfigError(f"{what}: {text!r} is no number of at least 1", fix="write a whole number, or nothing")
    return text or None


def _plan_options(given: Mapping[str, str]) -> list[str]:
    options = []
    if gpu := given.get("gpu", "").strip():
        if gpu.startswith("-"):
            raise ConfigError(f"GPU: {gpu!r} is no name", fix="choose one")
        options += ["--gpu", gpu]
    for name, what in (("gpus", "GPUs of a node"), ("nodes", "Nodes")):
        if (number := _number(given, name, what)) is not None:
            options += [f"--{name}", number]
    return options + (["--search"] if given.get("search") else [])


def _show_options(given: Mapping[str, str]) -> list[str]:
    choice, side = given.get("choice", "first"), given.get("set", "train")
    if choice not in CHOICES or side not in SETS:
        raise ConfigError("the page does not know which rows are meant", fix="open it again")
    number = _number(given, "rows", "Rows") or "3"
    which = [f"--{choice}", number] if choice != "first" else ["--row", f"0-{int(number) - 1}"]
    # The command itself chooses the first ones, where there are as many.
    return [
        "--set",
        side,
        *([] if choice == "first" and number == "3" else which),
        *(["--tokens"] if given.get("tokens") else []),
    ]


def address_of(kind: Kind, given: Mapping[str, str]) -> str:
    """Of the page that shows a form as it was filled in."""
    kept = {name: given[name] for name in FIELDS if given.get(name)}
    return f"/{'plan' if kind == 'plan' else 'audit'}?{urlencode(kept)}"
