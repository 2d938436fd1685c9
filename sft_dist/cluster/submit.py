"""``sft-dist submit``: a job's script from a configuration, shown or handed to SLURM."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from sft_dist.cluster.resources import Resources, planned_run, resources_of
from sft_dist.cluster.script import Place, render_train, resource_rows
from sft_dist.cluster.snapshot import code_here, last_submission, submission_folder
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.plan import words
from sft_dist.plan.result import Plan

TRAIN = "train.sbatch"


@dataclass(frozen=True)
class Prepared:
    """All that a submission needs.

    Args:
        plan: None where no GPU is known.
        scripts: by the names of their files, in the order in which the jobs run.
    """

    plan: Plan | None
    resources: Resources
    place: Place
    scripts: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.plan is None or self.plan.memory.verdict != "does not fit"


def prepare(config: Config, folder: Path | None = None) -> Prepared:
    """Plans a configuration and renders its scripts; writes nothing.

    Args:
        folder: of the submission; None: the one that would be next.

    Raises:
        ConfigError: resources are missing, or a path cannot be written into a script.
        SftError: as ``resources.planned_run``.
    """
    planned = planned_run(config)
    resources = resources_of(config, planned)
    run = Path(config.output_dir).resolve()
    folder = folder or submission_folder(run, last_submission(run) + 1)
    place = place_of(folder, run)
    scripts = {TRAIN: render_train(config, resources, place, name=run.name)}
    return Prepared(None if planned is None else planned.plan, resources, place, scripts)


def place_of(folder: Path, run: Path) -> Place:
    """Where a submission of this process is.

    Raises:
        ConfigError: SLURM could not write its output there.
    """
    if "\n" in str(run) or "\\" in str(run):
        raise ConfigError(
            f"output_dir: {str(run)!r} has a backslash or a line break, which sbatch cannot take in --output",
            fix="set another output_dir",
        )
    return Place(sys.executable, code_here().checkout, str(Path.cwd()), str(run), str(folder))


def show(prepared: Prepared, console: Console) -> None:
    """The plan's verdict, what is asked for and why, and the scripts."""
    for line in verdict_lines(prepared.plan):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    console.print("What the job asks for", style="bold")
    table = Table.grid(padding=(0, 2))
    for row in resource_rows(prepared.resources):
        table.add_row(*row)
    console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
    for name, text in prepared.scripts.items():
        console.print(f"\n{prepared.place.submission}/{name}", style="bold", highlight=False, soft_wrap=True)
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")


def verdict_lines(plan: Plan | None) -> list[str]:
    """Whether it fits, how long it takes and what that costs."""
    if plan is None:
        return ["Not planned: hardware.gpu is not set, and this machine has no GPU."]
    warnings = [f"! {warning}" for warning in plan.warnings]
    return [words.headline(plan), words.peak_line(plan.memory), words.run_line(plan), *warnings]
