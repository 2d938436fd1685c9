"""``sft-dist prepare``: what comes before a training job. Imports no torch at module level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import Overrides, checked_config, put_own_tools_on_path
from sft_dist.errors import ConfigError
from sft_dist.runtime.quiet import quiet_libraries

Sweep = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY.PATH=V1,V2",
        help="A run for each value, in OUTPUT_DIR/NAME; given several times, for each combination.",
    ),
]


def prepare(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run, or a folder of such files.")
    ],
    overrides: Overrides = None,
    sweep: Sweep = None,
) -> None:
    """Bring here what training reads from elsewhere, without a GPU: the model, datasets, the data in tokens and packs.

    The data is audited as training does; training then needs no network and prepares nothing. What is here is not
    fetched again. Goes on where it was stopped or killed.
    """
    if sweep:
        from sft_dist.cluster.sweep import plan_sweep

        configs = [point.config for point in plan_sweep(config, overrides or (), sweep).points]
    else:
        configs = [checked_config(path, overrides) for path in _files(config)]
    put_own_tools_on_path()
    quiet_libraries()
    from sft_dist.train.prepare import prepare as prepare_runs

    prepare_runs(configs, say=typer.echo)


def _files(config: Path) -> list[Path]:
    if not config.is_dir():
        return [config]
    files = sorted(config.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{config} is a folder without *.yaml", fix="give the YAML file of a run")
    return files
