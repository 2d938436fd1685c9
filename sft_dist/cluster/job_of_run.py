"""The job that trains a run: which one it is, what SLURM says of it, and how its starts so far ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft_dist.cluster.attempts import FOLDER, GIVE_UP, Attempt, read_attempts
from sft_dist.cluster.slurm import JobState, show_job
from sft_dist.errors import SftError
from sft_dist.metrics.heartbeat import Beat

SUBMISSION = "submission.json"

# Asks SLURM for the state of a job; raises an error of this project where nobody answers.
Ask = Callable[[str], JobState | None]


@dataclass(frozen=True)
class JobOfRun:
    """
    Args:
        job_id: of SLURM, of the newest job that trained or will train this run.
        state: what SLURM says of it; None: ``unknown`` says why not.
        attempts: starts that were noted, of this job and of those before it, the oldest first.
    """

    job_id: str
    state: JobState | None
    unknown: str | None
    attempts: tuple[Attempt, ...] = ()

    @property
    def last(self) -> Attempt | None:
        """The last start of this very job; None: it has not started, or nobody noted it."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].job == self.job_id else None

    @property
    def has_given_up(self) -> bool:
        return self.last is not None and self.last.decision == GIVE_UP


def job_of_run(folder: Path, beat: Beat | None, notes: list[str], *, ask: Ask = show_job) -> JobOfRun | None:
    """None: no job is known to train this run.

    Args:
        notes: gets what is there and cannot be read.
    """
    attempts = tuple(read_attempts(folder))
    candidates = [_submitted(folder, notes), *(attempt.job for attempt in attempts)]
    candidates.append(None if beat is None else beat.job_id)
    ids = [each for each in candidates if each is not None]
    if not ids:
        return None
    # SLURM counts its jobs upwards.
    job_id = max(ids, key=lambda each: int(each.partition("_")[0]))
    try:
        state, unknown = ask(job_id), None
    except SftError as error:
        state, unknown = None, f"what SLURM says of job {job_id} is not known: {error.what}"
    if state is None and unknown is None:
        unknown = f"SLURM does not know job {job_id} any more"
    return JobOfRun(job_id, state, unknown, attempts)


def _submitted(folder: Path, notes: list[str]) -> str | None:
    """Id of the training's job in the newest submission that has come to one."""
    for path in sorted(folder.glob(f"{FOLDER}/submission-*/{SUBMISSION}"), reverse=True):
        try:
            train = json.loads(path.read_text(encoding="utf-8"))["jobs"].get("train")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            notes.append(f"{path.relative_to(folder)} cannot be read: {error}")
            continue
        if train is not None:
            return str(train)
    return None
