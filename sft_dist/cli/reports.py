"""``sft-dist report`` and ``sft-dist compare``: runs as pages, and side by side. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.watching import RunFolder
from sft_dist.errors import ConfigError


def report_run(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The page; report.html in RUN_DIR by default.")
    ] = None,
) -> None:
    """Write a run as an HTML page: curves, plan and bill, data, answers, receipt. Training writes it by itself.

    The page needs no network and nothing beside it. Values of environment variables, and settings that look like
    secrets, are not on it.
    """
    from sft_dist.report.command import write_report

    typer.echo(write_report(run, out))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR RUN_DIR...", help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="An HTML page too, with curves.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, in place of the table.")] = False,
) -> None:
    """Show runs side by side: losses, scores, time and money, and the settings in which they differ."""
    from rich.console import Console

    from sft_dist.report.command import write_page
    from sft_dist.report.compare import compare as compared
    from sft_dist.report.compare import comparison_json, read_reports
    from sft_dist.report.compare_page import render_comparison
    from sft_dist.report.compare_terminal import comparison_table
    from sft_dist.report.read import read_report

    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder", fix="give the name of a file")
    comparison = compared(read_reports(runs, read_report))
    if as_json:
        typer.echo(comparison_json(comparison), nl=False)
    else:
        Console(highlight=False).print(comparison_table(comparison))
    if out is not None:
        write_page(out, render_comparison(comparison))
        typer.echo(str(out), err=as_json)


def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output_dir.")],
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say in what two runs differ: what their steps learn, settings, versions, where they ran, and from which step on
    that shows."""
    import json
    from dataclasses import asdict

    from sft_dist.report.differ import diff as find_differences
    from sft_dist.report.differ import told

    found = find_differences(first, second)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        return
    typer.echo(f"{first} | {second}")
    for line in told(found):
        typer.echo(line)
