"""``sft-dist status`` and ``sft-dist logs``: a run that may run elsewhere, seen from its folder. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sft_dist.errors import ConfigError
from sft_dist.runtime.failure import INTERRUPTED_EXIT_CODE

TROUBLE_EXIT_CODE = 1

RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run: its output_dir.")]


def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, until the run is over or Ctrl-C.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="TIME",
            help="For cron: one line, and exit code 1 if the run failed, will never start, or gave no sign of life or "
            "made no step for this long, e.g. 15m; a step may take 5 min in any case.",
        ),
    ] = None,
) -> None:
    """Say how a run stands, also while it runs elsewhere: step, time left, bill, last checkpoint, sign of life, job.

    Reads its folder, and asks SLURM for its job where SLURM can be reached. The first line says all in short. Ends with
    0 whatever the run does, unless --check is given.
    """
    if sum((as_json, watch, check is not None)) > 1:
        raise ConfigError("--json, --watch and --check are three ways to show it", fix="give one of them")
    from sft_dist.cluster.watch import check_status, show_status, watch_status

    if check is not None:
        from sft_dist.plan.front import parse_deadline

        if not check_status(run, silent_s=parse_deadline(check, option="--check")):
            raise typer.Exit(TROUBLE_EXIT_CODE)
        return
    with _quiet_end():
        if watch:
            watch_status(run)
        else:
            show_status(run, as_json=as_json)


def logs(
    run: RunFolder,
    rank: Annotated[
        str, typer.Option("--rank", metavar="R|all", help="Of this process; all: each line with its rank.")
    ] = "0",
    attempt: Annotated[
        str | None,
        typer.Option("--attempt", metavar="A", help="Of this start, a folder in RUN_DIR/logs; else the newest."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is added, also by the starts that follow.")
    ] = False,
    job: Annotated[bool, typer.Option("--job", help="What the SLURM job printed, in place of a process.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, metavar="LINES", help="Of what is there, only the last.")
    ] = 100,
) -> None:
    """Show what the processes of a run have printed, as they printed it; by default rank 0 of the newest start.

    The scripts of launch/ keep it in RUN_DIR/logs, a folder for each start.
    """
    if rank != "all" and not rank.isdecimal():
        raise ConfigError(f"--rank {rank} is no rank", fix="give its number, or all")
    if job and (rank != "0" or attempt is not None):
        raise ConfigError("--job shows what the job printed, of all its starts", fix="leave --rank and --attempt out")
    from sft_dist.cluster.logs import Choice, show_logs

    with _quiet_end():
        show_logs(
            run,
            Choice(rank=None if rank == "all" else int(rank), attempt=attempt, of_job=job, lines=lines, follow=follow),
        )


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Ctrl-C ends what only looks without a word, and so does a reader such as `head` that has enough."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    except BrokenPipeError:
        # Python would complain when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
