"""Changes of a configuration as ``key.path=value``, which the command line takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sft_dist.config.section import Section

# What tells the kinds of a section apart; it is named wherever a section is written whole.
KINDS = ("strategy", "type")


def section_overrides(name: str, was: Section, wanted: Section) -> tuple[str, ...]:
    """What turns a section of a file into another one; nothing where they say the same.

    Single keys where all that the file says of the section exists in the wanted one too, else the section as a whole.

    Args:
        was: as it was loaded: what it says by itself are its set fields.
    """
    if was == wanted:
        return ()
    if was.model_fields_set <= set(type(wanted).model_fields):
        changed = {key: value for key, value in vars(wanted).items() if value != _before(key, was, wanted)}
        if not any(isinstance(value, Section) for value in changed.values()):
            return tuple(f"{name}.{key}={_yaml(value)}" for key, value in changed.items())
    said = wanted.model_dump(mode="json", exclude_defaults=True)
    said |= {key: vars(wanted)[key] for key in KINDS if key in vars(wanted)}
    return (f"{name}={_yaml(said)}",)


def _before(key: str, was: Section, wanted: Section) -> Any:
    """What a key of the wanted section is where the file stays as it was."""
    if key in was.model_fields_set or key in KINDS:
        return vars(was)[key]
    return type(wanted).model_fields[key].get_default(call_default_factory=True)


def key_override(key: str, was: Any, wanted: Any) -> tuple[str, ...]:
    """One key, or nothing where it has that value."""
    return () if was == wanted else (f"{key}={_yaml(wanted)}",)


def _yaml(value: Any) -> str:
    """On one line: ``true``, ``2``, ``{strategy: zero3}``."""
    if isinstance(value, Mapping | list):
        text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=2**20)
        return text.strip()
    text = yaml.safe_dump(value, width=2**20)
    return text.removesuffix("\n...\n").strip()
