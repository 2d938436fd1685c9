"""``sft-dist config``: looks at a configuration without running it. Imports no torch at module level."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sft_dist.cli.options import ConfigPath, Overrides, checked_config, put_own_tools_on_path
from sft_dist.runtime.quiet import quiet_libraries

config_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at a configuration without running it."
)


@config_app.command("check")
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="Processes of the run, one for each GPU.")] = 1,
) -> None:
    """Say whether a configuration can be trained, without GPU, weights, data or network.

    Looks at the settings, at the model's config.json or what is known of it without, and at what goes together.
    """
    checked = checked_config(config, overrides)
    put_own_tools_on_path()
    quiet_libraries()
    from sft_dist.plan.check import check, report
    from sft_dist.runtime.world import WorldShape

    shape = WorldShape(1, processes)
    lines = report(check(checked, shape), shape)
    typer.echo(f"{config}: valid")
    for line in lines:
        typer.echo(f"  {line}")


@config_app.command("show")
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the configuration with every default, as YAML that can be loaded again."""
    from sft_dist.config.load import dump_config

    typer.echo(dump_config(checked_config(config, overrides)), nl=False)


@config_app.command("get")
def get(
    config: ConfigPath,
    key: Annotated[str, typer.Argument(metavar="KEY.PATH", help="Of one value, e.g. output_dir.")],
    overrides: Overrides = None,
) -> None:
    """Print one value of a configuration, for scripts: text as it is, anything else as JSON."""
    from sft_dist.config.load import value_at

    value = value_at(checked_config(config, overrides), key)
    typer.echo(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a configuration, for editors; every key is described in it."""
    from sft_dist.config.schema import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))
