"""``sft-dist sweep-table``: the runs of a sweep side by side. Imports no torch at module level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft_dist.errors import ConfigError


def sweep_table(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a sweep: the output_dir that was submitted.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV, with a header.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, a list of objects.")] = False,
) -> None:
    """Show what each point of a sweep has come to, also while it runs: state, step, losses, hours and cost.

    The point with the best loss is marked, where all of them are evaluated on the same data.
    """
    if as_csv and as_json:
        raise ConfigError("--csv and --json are two forms of one table", fix="give one of the two")
    from rich.console import Console

    from sft_dist.cluster import sweep_table as table
    from sft_dist.cluster.sweep_files import job_states, read_sweeps

    notes: list[str] = []
    sweeps = read_sweeps(folder)
    rows = table.sweep_rows(folder, job_states=job_states(sweeps, notes))
    if as_csv or as_json:
        for note in notes:
            typer.echo(note, err=True)
        typer.echo(table.to_csv(rows) if as_csv else table.to_json(rows), nl=False)
        return
    why = table.why_not_comparable(sweeps)
    notes += [] if why is None else [why]
    Console(highlight=False).print(table.sweep_table(rows, title=str(folder), notes=notes))
