"""``sft-dist submit``: jobs on a cluster. Imports no torch at module level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sft_dist.cli.options import ConfigPath, Examples, Overrides, TokensPerExample, checked_config
from sft_dist.cli.prepare import Sweep
from sft_dist.cli.usage import USAGE_ERROR
from sft_dist.errors import ConfigError, PlanError
from sft_dist.runtime.quiet import quiet_libraries

if TYPE_CHECKING:
    from sft_dist.cluster.sweep import Sweep as SweepPlan
    from sft_dist.cluster.wanted import Wanted
    from sft_dist.config.schema import Config
    from sft_dist.plan.assumed import AssumedData


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
    examples: Examples = None,
    tokens_per_example: TokensPerExample = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Submit although the plan says that it does not fit.")
    ] = False,
    sweep: Sweep = None,
    max_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --sweep: the most runs at once.")
    ] = None,
    prepares: Annotated[
        bool,
        typer.Option(
            "--prepare/--no-prepare",
            help="With or without a job before the training that fetches the model and prepares the data on CPUs.",
        ),
    ] = True,
) -> None:
    """Train as a job of SLURM: what it asks for follows from the plan and from the section `cluster`.

    A job without GPUs fetches the model and prepares the data first, as `prepare` does; cluster.then is run when the
    training has ended well. The job resumes after its time limit, a preemption or a failed node, until the run is done.
    What it runs is kept in output_dir/slurm/submission-NNN. Ends with 3 where the run does not fit.
    """
    if max_parallel is not None and not sweep:
        raise ConfigError("--max-parallel says how many runs of a sweep train at once", fix="give it with --sweep")
    from sft_dist.cluster.sweep import plan_sweep

    points = plan_sweep(config, overrides or (), sweep) if sweep else None
    configs = [checked_config(config, overrides)] if points is None else [point.config for point in points.points]
    if configs[0].cluster.then is not None:
        _check_then(configs[0].cluster.then.command, configs[0].output_dir)
    from rich.console import Console

    from sft_dist.cluster import submit as jobs
    from sft_dist.cluster.snapshot import empty_folders_removed

    assumed = None
    if examples is not None or tokens_per_example is not None:
        quiet_libraries()
        from sft_dist.plan.command import stated_data

        assumed = stated_data(examples, tokens_per_example)
    if dry_run:
        jobs.check_hold_no_runs(configs, resume=resume)
        what = _wanted(configs[0], points, max_parallel=max_parallel, prepares=prepares, assumed=assumed)
        jobs.show(what, Console())
        if not what.fits and not anyway:
            raise typer.Exit(PlanError.exit_code)
        return
    folders = [Path(each.output_dir) for each in configs] + ([] if points is None else [points.folder])
    with empty_folders_removed(folders):
        jobs.check_run_directories(configs, resume=resume)
        what = _wanted(configs[0], points, max_parallel=max_parallel, prepares=prepares, assumed=assumed)
        for line in jobs.verdict_lines(what):
            typer.echo(line)
        if not anyway:
            jobs.check_fit(what)
        if test_only:
            for line in jobs.would_run(what):
                typer.echo(line)
            return
        ids = jobs.submit(what, source=config, overrides=overrides or [], say=typer.echo)
    typer.echo(f"\nsubmitted {jobs.told(ids)}; to follow it:")
    folder = configs[0].output_dir if points is None else str(points.folder)
    for line in jobs.how_to_follow(folder, ids, points=len(what.points)):
        typer.echo(f"  {line}")


def _wanted(
    config: Config,
    points: SweepPlan | None,
    *,
    max_parallel: int | None,
    prepares: bool,
    assumed: AssumedData | None,
) -> Wanted:
    """Of a run, or of the points of a sweep."""
    from sft_dist.cluster.wanted import wanted, wanted_sweep

    if points is None:
        return wanted(config, prepares=prepares, assumed=assumed)
    return wanted_sweep(points, max_parallel=max_parallel, prepares=prepares, assumed=assumed)


def _check_then(command: str, run: str) -> None:
    """Reads ``cluster.then.command`` as the job will, which is days later.

    Raises:
        ConfigError: it is no command of this program.
    """
    from sft_dist.cli.app import app
    from sft_dist.cluster.side_jobs import RUN, words_of

    words = [word.replace(RUN, run) for word in words_of(command) if word != "--debug"]
    found: Any = typer.main.get_command(app)
    context = found.context_class(found, info_name="sft-dist")
    try:
        while hasattr(found, "get_command"):
            name, found, words = found.resolve_command(context, words)
            context = found.context_class(found, parent=context, info_name=name)
        found.make_context(context.info_name, words, parent=context.parent)
    except USAGE_ERROR as error:
        raise ConfigError(
            f"cluster.then.command: {command!r}: {error.format_message()}",
            fix="write what stands behind sft-dist on a command line, e.g. 'export {run} --merge'",
        ) from None
    except (typer.Exit, IndexError):
        raise ConfigError(
            f"cluster.then.command: {command!r} does nothing", fix="write a command, e.g. 'export {run} --merge'"
        ) from None
