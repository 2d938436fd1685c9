"""Nested settings as dotted keys, the way overrides name them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; an empty section and a list of scalars are one value.

    Args:
        value: as JSON has it; one without keys yields nothing.
        key: of ``value`` itself.
    """
    if isinstance(value, dict) and (value or not key):
        for name, each in value.items():
            yield from flat(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for number, each in enumerate(value):
            yield from flat(each, f"{key}.{number}")
    else:
        yield key, value
