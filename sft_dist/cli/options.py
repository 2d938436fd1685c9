"""What several commands share: their arguments, and what happens before each does its work.

Imports no torch, and at module level no schema: that takes longer than all the rest of ``--help``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sft_dist.config.schema import Config

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE",
        help="Change single keys, e.g. train.max_steps=20 'data.eval=[{path: x.jsonl}]'. The value is YAML.",
        show_default=False,
    ),
]
Examples = Annotated[
    str | None, typer.Option("--examples", metavar="N", help="Plan for so many rows of data, e.g. 10k.")
]
TokensPerExample = Annotated[
    str | None, typer.Option("--tokens-per-example", metavar="T", help="Their mean length, with the template.")
]
CheckpointOf = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="STEP|latest", help="Of a run: this checkpoint in place of final/."),
]


def checked_config(path: Path, overrides: Sequence[str] | None) -> Config:
    """The configuration in a file, with what the command line changes of it.

    Raises:
        ConfigError: with every mistake that can be seen in it alone.
    """
    from sft_dist.config.load import load_config
    from sft_dist.config.validate import validate

    config = load_config(path, overrides or [])
    validate(config, source=str(path))
    return config


def put_own_tools_on_path() -> None:
    """Lets DeepSpeed find the environment's ninja when the environment is used without being activated.

    Before the system's own: operators compiled with one version are compiled again by another.
    """
    tools = Path(sys.executable).parent
    if (tools / "ninja").exists():
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
