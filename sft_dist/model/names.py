"""How a configuration names parts of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sft_dist.config.validate_method import REGULAR_EXPRESSION
from sft_dist.errors import ConfigError


def covers(pattern: str, path: str) -> bool:
    """Whether ``pattern`` is, dot by dot, a piece of ``path``; behind ``re:`` it is an expression for all of it."""
    if pattern.startswith(REGULAR_EXPRESSION):
        return re.fullmatch(pattern.removeprefix(REGULAR_EXPRESSION), path) is not None
    return f".{pattern}." in f".{path}."


def covered(patterns: Iterable[str], paths: Iterable[str], *, key: str, kind: str, fix: str) -> list[str]:
    """The paths that some pattern covers, in their order.

    Args:
        key, kind: for the message: which key asks, and what it names.

    Raises:
        ConfigError: a pattern covers nothing.
    """
    patterns, paths = list(patterns), list(paths)
    unknown = [pattern for pattern in patterns if not any(covers(pattern, path) for path in paths)]
    if unknown:
        if unknown[0].startswith(REGULAR_EXPRESSION):
            expression = unknown[0].removeprefix(REGULAR_EXPRESSION)
            ends_so = f"{REGULAR_EXPRESSION}.*{expression}"
            raise ConfigError(
                f"{key}: {unknown[0]} matches no {kind}; behind {REGULAR_EXPRESSION} stands an expression for a whole "
                f"path, such as {next(iter(paths), '')}",
                fix=f"write {ends_so} for what ends so"
                if any(covers(ends_so, path) for path in paths)
                else f"correct the expression; the last {kind} is {next(reversed(paths), '')}",
            )
        raise ConfigError(f"{key}: the model has no {kind} named {', '.join(unknown)}", fix=fix)
    return [path for path in paths if any(covers(pattern, path) for pattern in patterns)]
