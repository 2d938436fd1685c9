"""``sft-dist lr-find``. Imports no torch at module level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import ConfigPath, Overrides, checked_config, put_own_tools_on_path
from sft_dist.errors import ConfigError
from sft_dist.runtime.quiet import quiet_libraries


def lr_find(
    config: ConfigPath,
    overrides: Overrides = None,
    least: Annotated[float, typer.Option("--min-lr", metavar="LR", help="Rate of the first step.")] = 1e-7,
    most: Annotated[float, typer.Option("--max-lr", metavar="LR", help="Rate of the last step.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=10, metavar="N", help="Steps, of a global batch each.")] = 100,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write here; else into OUTPUT_DIR.lr-find.")
    ] = None,
) -> None:
    """Train some steps at rising learning rates, and suggest one for optim.lr. Keeps nothing of the model.

    Under a launcher or in this process, as train does. Writes lr_find.json and lr_find.svg, nothing into output_dir.
    """
    if not 0 < least < most:
        raise ConfigError(
            f"--min-lr is {least:g} and --max-lr is {most:g}", fix="give a --min-lr above 0 and a larger --max-lr"
        )
    checked = checked_config(config, overrides)
    from sft_dist.train.preflight import preflight

    folder = out or Path(checked.output_dir.rstrip("/") + ".lr-find")
    put_own_tools_on_path()
    quiet_libraries()
    from sft_dist.train.lr_curve import rates
    from sft_dist.train.lr_find import beside, find_lr

    test = beside(checked, folder)
    preflight(test)
    find_lr(test, rates(least, most, steps))
