"""``sft-dist model``: models of the Hugging Face hub. Imports no torch at module level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import ConfigPath, Overrides, checked_config

model_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Models of the Hugging Face hub.")


@model_app.command("fetch")
def fetch(
    config: ConfigPath,
    overrides: Overrides = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights", help="Without weights it is enough to check a run and prepare its data."
        ),
    ] = True,
) -> None:
    """Bring the hub model of a configuration into the local hub cache; training itself never asks the hub.

    Goes on where an interrupted fetch stopped. For a model that is not public, set HF_TOKEN or run: hf auth login.
    """
    model = checked_config(config, overrides).model
    from sft_dist.model.hub import is_folder_path, model_folder
    from sft_dist.model.hub_fetch import fetch as fetch_model

    if is_folder_path(model.path) or Path(model.path).is_dir():
        folder = model_folder(model.path, model.revision)
        typer.echo(f"{folder} is a folder on this machine: there is nothing to fetch")
        return
    fetched = fetch_model(model.path, model.revision, weights=weights, say=typer.echo)
    news = f"{fetched.new_bytes / 1e9:,.3f} GB of weights fetched" if fetched.new_bytes else "nothing was missing"
    typer.echo(f"{model.path} is in {fetched.folder}: {news if weights else 'configuration and tokenizer'}")
