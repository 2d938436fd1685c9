"""Mistakes in the words of a command line, told as all others are."""

from __future__ import annotations

from typing import Any

import typer

from sft_dist.errors import ConfigError

# What typer's parser raises, wherever that comes from.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def mistake(error: Any) -> ConfigError | None:
    """
    Args:
        error: a ``USAGE_ERROR``.

    Returns:
        None where a group of commands was given none: its message is the help.
    """
    if error.ctx is None:
        return ConfigError(error.format_message().rstrip("."), fix="see `sft-dist --help`")
    if error.format_message() == error.ctx.get_help():
        return None
    usage = " ".join(error.ctx.get_usage().split()).removeprefix("Usage: ")
    return ConfigError(
        error.format_message().rstrip("."), fix=f"{usage}; `{error.ctx.command_path} --help` explains each of them"
    )
