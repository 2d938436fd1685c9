"""``sft-dist submit``: jobs on a cluster. Imports no torch at module level."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from sft_dist.cli.options import ConfigPath, Overrides, checked_config
from sft_dist.errors import PlanError


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Submit nothing: show the plan's verdict, what is asked for and the script."),
    ] = False,
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Submit nothing: ask SLURM whether and when it would run.")
    ] = False,
    resume: Annotated[
        str, typer.Option(metavar="auto|never", help="auto: output_dir may hold a run, and the job goes on with it.")
    ] = "never",
    examples: Annotated[
        str | None, typer.Option("--examples", metavar="N", help="Plan for so many rows of data, e.g. 10k.")
    ] = None,
    tokens_per_example: Annotated[
        str | None, typer.Option("--tokens-per-example", metavar="T", help="Their mean length, with the template.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Submit although the plan says that it does not fit.")
    ] = False,
) -> None:
    """Train as a job of SLURM: what it asks for follows from the plan and from the section `cluster`.

    The job resumes after its time limit, a preemption or a failed node, until the run is done. What it runs is kept
    in output_dir/slurm/submission-NNN. Ends with 3 where the run does not fit.
    """
    checked = checked_config(config, overrides)
    from sft_dist.cluster import submit as jobs

    assumed = None
    if examples is not None or tokens_per_example is not None:
        from sft_dist.plan.command import stated_data

        assumed = stated_data(examples, tokens_per_example)
    if dry_run:
        what = jobs.wanted(checked, assumed=assumed)
        jobs.show(what, Console())
        if not what.fits and not anyway:
            raise typer.Exit(PlanError.exit_code)
        return
    jobs.check_run_directory(checked, resume=resume)
    what = jobs.wanted(checked, assumed=assumed)
    for line in jobs.verdict_lines(what.plan):
        typer.echo(line)
    if not anyway:
        jobs.check_fit(what)
    if test_only:
        for line in jobs.would_run(what):
            typer.echo(line)
        return
    ids = jobs.submit(what, source=config, overrides=overrides or [], say=typer.echo)
    typer.echo(f"\nsubmitted job {ids['train']}; to follow it:")
    for line in jobs.how_to_follow(checked, ids):
        typer.echo(f"  {line}")
