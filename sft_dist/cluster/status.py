"""How a run stands, read from its folder while it runs elsewhere. Nothing is written, no process of it is asked."""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sft_dist.cluster.attempts import FOLDER as SLURM
from sft_dist.cluster.evidence import Evidence, Pulse
from sft_dist.cluster.file_clock import Clock, clock_of
from sft_dist.cluster.job_of_run import Ask, JobOfRun, job_of_run
from sft_dist.cluster.read_evidence import read_evidence
from sft_dist.cluster.slurm import show_job
from sft_dist.cluster.verdict import ENDED, SILENT_S, Forecast, Verdict, forecast, judge, step_of
from sft_dist.errors import ConfigError
from sft_dist.metrics.heartbeat import HEARTBEAT
from sft_dist.train.resume import holds_a_run
from sft_dist.train.run_lock import LOCK, Holder

# Higher when a key changes its meaning or goes.
FORMAT = 1

# Of free space: with less, metrics and checkpoints will soon have no room.
LITTLE_BYTES = 2**30


@dataclass(frozen=True)
class Status:
    """
    Args:
        step: completed steps; None: not known.
        clock: by which all ages were taken.
        free_bytes: of the disk of the folder.
        silent_s: after how long without a heartbeat it is called silent.
        notes: what is not known and why, a line each.
    """

    folder: Path
    verdict: Verdict
    step: int | None
    forecast: Forecast | None
    found: Evidence
    job: JobOfRun | None
    clock: Clock
    free_bytes: int
    notes: tuple[str, ...]
    silent_s: float = SILENT_S


def read_status(folder: Path, *, clock: Clock | None = None, ask: Ask = show_job, silent_s: float = SILENT_S) -> Status:
    """How the run in a folder stands.

    Args:
        clock: the moment it is; None: that of the file system.
        ask: for the state of its job.
        silent_s: after how long without a heartbeat a run that should be there is called silent.

    Raises:
        ConfigError: the folder holds no run, and none was submitted into it.
    """
    require_run(folder)
    clock = clock or clock_of(folder)
    found = read_evidence(folder, clock)
    notes = list(found.notes)
    job = job_of_run(folder, None if found.pulse is None else found.pulse.beat, notes, ask=ask)
    if job is not None and job.unknown is not None:
        notes.append(job.unknown)
    if clock.is_local:
        notes.append("the folder cannot be written: ages are by the clock of this machine")
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < LITTLE_BYTES and not found.finished:
        notes.append(f"the disk has {free_bytes / 2**20:,.0f} MiB free")
    verdict = judge(found, job, now=clock.now, is_gone=_is_gone(folder, found.pulse), silent_s=silent_s)
    return Status(
        folder, verdict, step_of(found), _ahead(found, verdict), found, job, clock, free_bytes, tuple(notes), silent_s
    )


def later(status: Status, clock: Clock) -> Status:
    """What ``read_status`` would say at a later moment if no file has changed since and SLURM says the same."""
    found, by_s = status.found, clock.now - status.clock.now
    pulse, measured, saved = found.pulse, found.measured, found.saved
    if pulse is not None:
        step_age_s = None if pulse.step_age_s is None else pulse.step_age_s + by_s
        pulse = replace(pulse, age_s=pulse.age_s + by_s, step_age_s=step_age_s, phase_age_s=pulse.phase_age_s + by_s)
    if measured is not None:
        measured = replace(measured, age_s=measured.age_s + by_s)
    if saved.age_s is not None:
        saved = replace(saved, age_s=saved.age_s + by_s)
    found = replace(found, pulse=pulse, measured=measured, saved=saved)
    silent_s, is_gone = status.silent_s, _is_gone(status.folder, pulse)
    verdict = judge(found, status.job, now=clock.now, is_gone=is_gone, silent_s=silent_s)
    return replace(status, verdict=verdict, forecast=_ahead(found, verdict), found=found, clock=clock)


def _ahead(found: Evidence, verdict: Verdict) -> Forecast | None:
    """None once nothing more is trained: an early end leaves steps that never are."""
    is_over = found.pulse is not None and found.pulse.beat.phase in ("exporting", "proving", "done")
    return None if is_over or verdict.kind in ENDED else forecast(found)


def require_run(folder: Path) -> None:
    """
    Raises:
        ConfigError: as ``read_status``.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder here", fix="give the output_dir of a run")
    if not is_run(folder):
        raise ConfigError(
            f"{folder} holds no run: it has none of config.yaml, metrics.jsonl, checkpoints/, {HEARTBEAT} and {SLURM}/",
            fix="give the output_dir of a run that has begun or was submitted; `config show CONFIG` prints it",
        )


def is_run(folder: Path) -> bool:
    """Whether a run has begun in a folder, or was submitted into it."""
    return holds_a_run(folder) or (folder / HEARTBEAT).exists() or (folder / SLURM).is_dir()


def _is_gone(folder: Path, pulse: Pulse | None) -> bool | None:
    """Whether the process that wrote the heartbeat is no more; None: only its own machine can tell.

    Rank 0 holds the lock of the folder for as long as its process lives (``train/run_lock.py``).
    """
    if pulse is None or pulse.beat.host != socket.gethostname():
        return None
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None  # no lock, or a file system without
    # It was free; a run that takes it in this very moment waits for as long as this process held it.
    holder = Holder.read(folder / LOCK)
    return holder is not None and holder.pid == pulse.beat.pid


def status_json(status: Status) -> dict[str, Any]:
    """For programs: ``json.dumps`` can write it. Times are ISO 8601, None is what is not known."""
    found, job = status.found, status.job
    document: dict[str, Any] = {
        "format": FORMAT,
        "folder": str(status.folder),
        "state": status.verdict.kind,
        "verdict": status.verdict.line,
        "is_trouble": status.verdict.is_trouble,
        "step": status.step,
        "num_steps": found.num_steps,
        "forecast": None if status.forecast is None else asdict(status.forecast),
        "finished": found.finished,
        "final": found.final,
    }
    for name in ("pulse", "measured", "bill", "planned", "saved"):
        value = getattr(found, name)
        document[name] = None if value is None else asdict(value)
    document["happened"] = [asdict(each) for each in found.happened]
    document["job"] = None if job is None else asdict(job)
    document |= {"clock": asdict(status.clock), "free_bytes": status.free_bytes, "notes": list(status.notes)}
    plain: dict[str, Any] = json.loads(json.dumps(document, default=_plain, allow_nan=False))
    return plain


def _plain(value: Any) -> str:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)
