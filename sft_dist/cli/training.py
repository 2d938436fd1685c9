"""``sft-dist train`` and ``sft-dist resume``. Imports no torch at module level."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sft_dist.cli.options import ConfigPath, Overrides, checked_config, put_own_tools_on_path
from sft_dist.cli.planning import show_plan
from sft_dist.errors import ConfigError
from sft_dist.runtime.quiet import quiet_libraries
from sft_dist.train.asked import AUTO, NEVER, Asked

if TYPE_CHECKING:
    from sft_dist.config.schema import Config

AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="NAME",
        help="Go on from a checkpoint although this value differs from that of the checkpoint, such as train.seed or "
        "data.train; may be given several times.",
    ),
]


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on from the newest checkpoint in output_dir, or begin; PATH: go on from that checkpoint.",
        ),
    ] = NEVER,
    allow_change: AllowChange = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: say whether it fits, how long it takes and what it costs, as the command plan does; "
            "hardware.gpu=NAME, hardware.gpus_per_node=N and the like say on what. Ends with 3 where it does not fit.",
        ),
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="First do each thing that the run will do once, at full size: the longest batch, an evaluation, a "
            "save, a reload, a resumption, the export and its proof. Then train, as without.",
        ),
    ] = False,
    rehearse_only: Annotated[
        bool, typer.Option("--rehearse-only", help="Do that and end: output_dir is then as it was.")
    ] = False,
    profile: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Trace N steps, once the run is warm: where their time goes, by part, kind of work and operator. "
            "output_dir/profile has the trace of each rank and its summary.",
        ),
    ] = 0,
) -> None:
    """Train. Under a launcher (torchrun, accelerate, deepspeed) each process runs this; without one, this process does.

    Paths in the configuration count from the current directory. See `plan` and --dry-run for what a run will take;
    receipt.json in output_dir says in the end what it took.
    """
    if dry_run and (rehearse or rehearse_only):
        raise ConfigError("--dry-run trains nothing, and a rehearsal trains some steps", fix="give one of the two")
    if profile and (dry_run or rehearse_only):
        raise ConfigError("--profile traces steps, and none are trained", fix="leave out --dry-run or --rehearse-only")
    checked = checked_config(config, overrides)
    if dry_run:
        show_plan(checked)
        return
    asked = Asked(
        resume=resume,
        allowed=allow_change or (),
        rehearsing="only" if rehearse_only else "first" if rehearse else "no",
        profiled_steps=profile,
    )
    run_checked(checked, asked)


def run_checked(checked: Config, asked: Asked) -> None:
    """Trains with a configuration that was checked, as ``run_training`` does; at news the run's page is written anew.

    ``asked.on_news`` is not called.
    """
    from sft_dist.runtime.world import restarts

    if asked.rehearsing != "only":  # which leaves the run directory as it was
        _keep_what_is_printed(checked)
    from sft_dist.train.preflight import preflight
    from sft_dist.train.resume import resume_after_restart

    if restarts():
        resume = resume_after_restart(asked.resume, checked.output_dir)
        asked = replace(asked, resume=resume)
        if os.environ["RANK"] == "0":
            place = f"--resume {resume}" if resume != AUTO else "the newest checkpoint, as with --resume auto"
            typer.echo(f"restart {restarts()}: going on from {place}")
    preflight(checked, resume=asked.resume)
    put_own_tools_on_path()
    quiet_libraries()
    from sft_dist.train.run import run_training

    with _page(checked) as refresh:
        run_training(checked, replace(asked, on_news=refresh))


@contextmanager
def _page(config: Config) -> Iterator[Callable[[], None]]:
    """Yields what brings report.html up to date; once the run is over, well or not, it is written for the last time."""
    from sft_dist.report.beside import Page

    page = Page(Path(config.output_dir), say=lambda line: typer.echo(line, err=True))
    try:
        yield page.refresh
    finally:
        page.close()


def _keep_what_is_printed(config: Config) -> None:
    """In a log of each rank, where a launcher has started several."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from sft_dist.runtime.rank_log import keep
    from sft_dist.runtime.world import World

    keep(Path(config.output_dir), World.from_environment())


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: its output_dir.")],
    overrides: Overrides = None,
    verify: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Train nothing new: train up to K recorded steps again from a checkpoint, and compare.",
        ),
    ] = None,
    allow_change: AllowChange = None,
) -> None:
    """Go on with a run from its newest checkpoint, on whatever processes this is started on.

    The same as `train RUN/config.yaml --resume auto`: with the settings as they were resolved, but for those given
    here.
    """
    from sft_dist.train.preflight import preflight
    from sft_dist.train.resume import config_of

    checked = checked_config(config_of(run), [f"output_dir={json.dumps(str(run))}", *(overrides or ())])
    if verify is None:  # which writes nothing
        _keep_what_is_printed(checked)
    preflight(checked, resume=AUTO)
    put_own_tools_on_path()
    quiet_libraries()
    if verify is not None:
        from sft_dist.train.verify_steps import verify_steps

        verify_steps(checked, steps=verify, allowed=allow_change or ())
        return
    from sft_dist.train.run import run_training

    with _page(checked) as refresh:
        run_training(checked, Asked(resume=AUTO, allowed=allow_change or (), on_news=refresh))
