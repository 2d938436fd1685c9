"""``sft-dist submit``: jobs from a configuration, shown or handed to SLURM."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from sft_dist.cluster import slurm
from sft_dist.cluster.resources import Resources, planned_run, resources_of
from sft_dist.cluster.script import Place, render_train, resource_rows
from sft_dist.cluster.snapshot import (
    RECORD,
    checkout,
    code_here,
    last_submission,
    new_submission,
    record,
    submission_folder,
    write_submission,
)
from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError, ConfigError, PlanError
from sft_dist.plan import words
from sft_dist.plan.result import Plan
from sft_dist.train.preflight import preflight
from sft_dist.train.resume import AUTO, NEVER

if TYPE_CHECKING:
    from sft_dist.plan.assumed import AssumedData

TRAIN = "train.sbatch"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be submitted, and what that takes.

    Args:
        run: ``output_dir``, absolute.
        plan: None where no GPU is known.
    """

    config: Config
    run: Path
    plan: Plan | None
    resources: Resources

    @property
    def fits(self) -> bool:
        return self.plan is None or self.plan.memory.verdict != "does not fit"


def wanted(config: Config, *, assumed: AssumedData | None = None) -> Wanted:
    """Plans a configuration; writes nothing.

    Args:
        assumed: what the data is like, where its owner says so.

    Raises:
        ConfigError: resources are missing, or SLURM could not write its output into the run directory.
        SftError: as ``resources.planned_run``.
    """
    run = Path(config.output_dir).resolve()
    if "\n" in str(run) or "\\" in str(run):
        raise ConfigError(
            f"output_dir: {str(run)!r} has a backslash or a line break, which sbatch cannot take in --output",
            fix="set another output_dir",
        )
    planned = planned_run(config, assumed=assumed)
    plan = None if planned is None else planned.plan
    return Wanted(config, run, plan, resources_of(config, planned))


def scripts_of(what: Wanted, folder: Path) -> dict[str, str]:
    """The scripts of a submission, by the names of their files, in the order in which the jobs run.

    Args:
        folder: of the submission.
    """
    code = checkout()
    place = Place(
        python=sys.executable,
        checkout=None if code is None else str(code),
        directory=str(Path.cwd()),
        run=str(what.run),
        submission=str(folder),
    )
    return {TRAIN: render_train(what.config, what.resources, place, name=what.run.name)}


def show(what: Wanted, console: Console) -> None:
    """The plan's verdict, what is asked for and why, and the scripts."""
    for line in verdict_lines(what.plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print("\nWhat the job asks for", style="bold")
    table = Table.grid(padding=(0, 2))
    for row in resource_rows(what.resources):
        table.add_row(*row)
    console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
    folder = submission_folder(what.run, last_submission(what.run) + 1)
    for name, text in scripts_of(what, folder).items():
        console.print(f"\n{folder / name}", style="bold", highlight=False, markup=False, soft_wrap=True)
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")


def verdict_lines(plan: Plan | None) -> list[str]:
    """Whether it fits, how long it takes and what that costs."""
    if plan is None:
        return ["Not planned: no GPU is known (hardware.gpu)."]
    warnings = [f"! {warning}" for warning in plan.warnings]
    return [words.headline(plan), words.peak_line(plan.memory), words.run_line(plan), *warnings]


def check_fit(what: Wanted) -> None:
    """
    Raises:
        PlanError: the run does not fit.
    """
    if not what.fits:
        assert what.plan is not None
        raise PlanError(
            f"{words.headline(what.plan)}: {words.peak_line(what.plan.memory)}",
            fix="see `sft-dist plan CONFIG` for what makes it fit; --anyway submits it as it is",
        )


def check_run_directory(config: Config, *, resume: str) -> None:
    """What ``train`` checks before it starts, and that no job of an earlier submission is still to come or running.

    Raises:
        ConfigError: the run directory is used; as ``preflight``.
    """
    if resume not in (AUTO, NEVER):
        raise ConfigError(
            f"--resume {resume}: a job that is started again goes on from the newest checkpoint of its own output_dir",
            fix="give --resume auto, or none for a new run",
        )
    run = Path(config.output_dir)
    for name, job_id in jobs_of(run, last_submission(run)).items():
        job = slurm.show_job(job_id)
        if job is not None and not job.has_ended:
            raise ConfigError(
                f"output_dir: job {job_id} ({name}) of {submission_folder(run, last_submission(run))} is "
                f"{job.state.lower()}, and writes there",
                fix=f"let it end, end it by `scancel {job_id}`, or set another output_dir",
            )
    preflight(config, resume=resume)


def jobs_of(run: Path, number: int) -> dict[str, str]:
    """SLURM's ids of a submission's jobs by what they do; empty where nothing was submitted.

    Raises:
        CheckpointError: its record is damaged.
    """
    path = submission_folder(run, number) / RECORD
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["jobs"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", fix="move that folder elsewhere") from error


def would_run(what: Wanted) -> list[str]:
    """Asks SLURM about each job, and submits none: what it says, a line each.

    Raises:
        ConfigError: it refuses one of them.
        MachineError: it does not answer.
    """
    folder = submission_folder(what.run, last_submission(what.run) + 1)
    with tempfile.TemporaryDirectory(prefix="sft-dist-submit-") as place:
        return _ask(scripts_of(what, folder), Path(place))


def _ask(scripts: dict[str, str], folder: Path) -> list[str]:
    said = []
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
        said.append(slurm.submit(folder / name, test_only=True).removeprefix("sbatch: "))
    return said


def submit(what: Wanted, *, source: Path, overrides: Sequence[str], say: Say) -> dict[str, str]:
    """Writes a submission into the run directory and hands its jobs to SLURM, which is asked first.

    Args:
        source: the file of the configuration; overrides: of it on the command line.

    Returns:
        SLURM's ids by what the jobs do, e.g. ``train``.

    Raises:
        ConfigError: SLURM refuses, or the run directory cannot be written. Nothing is left there then.
        MachineError: SLURM does not answer.
    """
    folder = new_submission(what.run)
    scripts = scripts_of(what, folder)
    code = code_here()
    try:
        write_submission(folder, what.config, scripts, code)
        for answer in _ask(scripts, folder):
            say(answer)
        jobs = {name.partition(".")[0]: slurm.submit(folder / name) for name in scripts}
    except BaseException:
        shutil.rmtree(folder)
        raise
    record(folder, code=code, source=source, overrides=overrides, jobs=jobs)
    return jobs


def how_to_follow(config: Config, jobs: dict[str, str]) -> list[str]:
    """Commands that show how the jobs are doing."""
    run = config.output_dir
    output = f"{run}/slurm/train-{jobs['train']}.out"
    return [
        f"sft-dist status {shlex.quote(run)}",
        f"sft-dist logs {shlex.quote(run)}",
        f"tail -F {shlex.quote(output)}",
    ]
