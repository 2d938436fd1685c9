"""``sft-dist submit``: jobs from a configuration, shown or handed to SLURM."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from sft_dist.cluster import slurm
from sft_dist.cluster.chain import Link, submit_chain
from sft_dist.cluster.script import Place, render_train, resource_rows
from sft_dist.cluster.side_jobs import render_prepare, render_then
from sft_dist.cluster.snapshot import (
    RECORD,
    last_submission,
    new_submission,
    record,
    submission_folder,
    write_submission,
)
from sft_dist.cluster.sweep_files import write_sweep
from sft_dist.cluster.wanted import Wanted
from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError, ConfigError, PlanError
from sft_dist.plan import words
from sft_dist.plan.to_json import PLAN, plan_text
from sft_dist.runtime.code import checkout, code_here
from sft_dist.train.asked import AUTO, NEVER
from sft_dist.train.preflight import check_holds_no_run, preflight
from sft_dist.train.run_files import keep_file

PREPARE, TRAIN, THEN = "prepare.sbatch", "train.sbatch", "then.sbatch"

Say = Callable[[str], None]


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
    cluster, name, points = what.config.cluster, what.run.name, what.points
    scripts = {}
    if what.prepares:
        scripts[PREPARE] = render_prepare(cluster, place, name=f"{name}-prepare", points=points)
    scripts[TRAIN] = render_train(what.config, what.resources, place, name=name, points=points, array=what.array)
    if cluster.then is not None:
        scripts[THEN] = render_then(cluster, place, name=f"{name}-then", points=points, array=what.array)
    return scripts


def show(what: Wanted, console: Console) -> None:
    """The plan's verdict, what is asked for and why, and the scripts."""
    for line in verdict_lines(what):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    whose = "What the job asks for" if what.sweep is None else "What the job of each point asks for"
    console.print(f"\n{whose}", style="bold")
    table = Table.grid(padding=(0, 2))
    for row in resource_rows(what.resources):
        table.add_row(*row)
    console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
    folder = submission_folder(what.run, last_submission(what.run) + 1)
    for name, text in scripts_of(what, folder).items():
        console.print(f"\n{folder / name}", style="bold", highlight=False, markup=False, soft_wrap=True)
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")


def verdict_lines(what: Wanted) -> list[str]:
    """Whether it fits, how long it takes and what that costs."""
    lines = []
    if what.sweep is not None:
        names = what.points
        lines.append(f"{len(names)} points in {what.run}: {', '.join(names)}")
        lines.append(f"Each asks for what any of them needs; the plan of {Path(what.config.output_dir).name}:")
    if what.plan is None:
        return [*lines, "Not planned: no GPU is known (hardware.gpu)."]
    warnings = [f"! {warning}" for warning in what.plan.warnings]
    return [*lines, words.headline(what.plan), words.peak_line(what.plan.memory), words.run_line(what.plan), *warnings]


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


def check_run_directories(configs: Sequence[Config], *, resume: str) -> None:
    """``check_run_directory`` of every run, before anything is written."""
    for config in configs:
        check_run_directory(config, resume=resume)


def check_run_directory(config: Config, *, resume: str) -> None:
    """What ``train`` checks before it starts, and that no job of an earlier submission is still to come or running.

    Raises:
        ConfigError: the run directory is used; as ``preflight``.
    """
    _check_resume(resume)
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


def check_hold_no_runs(configs: Sequence[Config], *, resume: str) -> None:
    """Of ``check_run_directories`` what needs neither SLURM nor the data, for a dry run; writes nothing.

    Raises:
        ConfigError: a run has begun in one of them, and is not to be gone on with.
    """
    _check_resume(resume)
    for config in configs if resume == NEVER else ():
        check_holds_no_run(Path(config.output_dir))


def _check_resume(resume: str) -> None:
    if resume not in (AUTO, NEVER):
        raise ConfigError(
            f"--resume {resume}: a job that is started again goes on from the newest checkpoint of its own output_dir",
            fix="give --resume auto, or none for a new run",
        )


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
        write_submission(folder, None if what.sweep else what.config, scripts, code)
        if what.sweep is not None:
            write_sweep(what.sweep, folder)
        for answer in _ask(scripts, folder):
            say(answer)
        jobs = submit_chain(
            [Link(name.partition(".")[0], folder / name, name == THEN and what.sweep is not None) for name in scripts]
        )
    except BaseException:
        shutil.rmtree(folder)
        raise
    record(folder, code=code, source=source, overrides=overrides, jobs=jobs)
    if what.plan is not None and what.sweep is None:
        keep_file(what.run / PLAN, plan_text(what.plan) + "\n")  # doctor and status count with it
    if what.sweep is not None:
        for index, point in enumerate(what.sweep.points):
            own = new_submission(what.run / point.name)
            write_submission(own, point.config, {}, code)
            record(
                own, code=code, source=source, overrides=[*overrides, *point.overrides],
                jobs=jobs_of_point(jobs, index), sweep=str(folder),
            )  # fmt: skip
    return jobs


def jobs_of_point(jobs: dict[str, str], index: int) -> dict[str, str]:
    """SLURM's ids of the jobs of one point: elements of the arrays, and the preparation for all."""
    return {name: job_id if name == "prepare" else f"{job_id}_{index}" for name, job_id in jobs.items()}


def told(jobs: dict[str, str]) -> str:
    """``job 12 (train)``, or ``jobs 12 (prepare), 13 (train)``."""
    said = [f"{job_id} ({name})" for name, job_id in jobs.items()]
    return f"job{'s' if len(said) > 1 else ''} {', '.join(said)}"


def how_to_follow(run: str, jobs: dict[str, str], *, points: int = 0) -> list[str]:
    """Commands that show how the jobs are doing.

    Args:
        points: of a sweep; 0: a single run.
    """
    first, job_id = next(iter(jobs.items()))
    output = f"{first}-{job_id}{'_0' if points and first != 'prepare' else ''}.out"
    return [
        f"sft-dist status {shlex.quote(run)}",
        f"sft-dist logs {shlex.quote(run)}",
        f"tail -F {shlex.quote(f'{run}/slurm/{output}')}",
    ]
