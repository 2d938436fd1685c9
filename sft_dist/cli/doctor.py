"""``sft-dist doctor``. Imports no torch: what can be used of it is what is to be found out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import Overrides, checked_config


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file that describes the run.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was found as JSON, too.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="That training will use on the first node; by default the next step's of the SLURM job.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=5, help="That it may take, in all.")] = 20.0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure cores, GPUs and links, too.")] = True,
) -> None:
    """Check that this machine, or all nodes of a job, can do what a run needs: disks, memory, GPUs, network, versions.

    On the nodes of a job: `srun --ntasks-per-node=1 sft-dist doctor CONFIG`, or one process a node under torchrun. Ends
    with 7 on all of them where training would fail; warnings end with 0. With SFT_DIST_JOB_NOTES set, doctor.json is
    written in that folder.
    """
    from sft_dist.doctor.command import doctor as examine
    from sft_dist.doctor.examine import Effort
    from sft_dist.doctor.place import find_place
    from sft_dist.doctor.wanted import wanted_of

    place = find_place(port=port)
    words = () if config is None else (str(config), *(overrides or ()))
    wanted = wanted_of(None if config is None else checked_config(config, overrides), words)
    code = examine(place, wanted, effort=Effort(seconds=seconds, measure=speed), json_file=json_file)
    if code:
        raise typer.Exit(code)
