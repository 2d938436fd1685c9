"""How runs stand, again and again: files are read when they have changed, and large ones not at every look."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from sft_dist.checkpoint.source import CHECKPOINTS, FINAL
from sft_dist.cluster.attempts import FOLDER as SLURM
from sft_dist.cluster.file_clock import Clock, clock_of
from sft_dist.cluster.job_of_run import Ask
from sft_dist.cluster.slurm import JobState, show_job
from sft_dist.cluster.status import Status, later, read_status
from sft_dist.cluster.watch import OVER
from sft_dist.errors import SftError
from sft_dist.export.provenance import RECEIPT
from sft_dist.metrics.heartbeat import HEARTBEAT
from sft_dist.metrics.logger import METRICS
from sft_dist.plan.to_json import PLAN
from sft_dist.report.model import ReportData
from sft_dist.report.read import read_report
from sft_dist.report.samples import SAMPLES
from sft_dist.train.run_files import AUDIT, CONFIG

# Reading takes at most this share of the time.
MAX_SHARE = 0.1

# SLURM is asked for a job, and a run that is over is looked at, no oftener.
ASK_S, OVER_S = 30.0, 15.0

MAX_REPORTS = 8

# What a report is made of: a heartbeat every 5 s changes none of its curves.
OF_A_REPORT = (METRICS, RECEIPT, SAMPLES, AUDIT, CONFIG, CHECKPOINTS)
OF_A_STATUS = (
    HEARTBEAT, METRICS, RECEIPT, CONFIG, PLAN, CHECKPOINTS, FINAL, f"{FINAL}.unfinished", SLURM,
    f"{SLURM}/attempts.jsonl",
)  # fmt: skip

# Of each file its size and when it was written; None: it is not there.
Signature = tuple[tuple[int, int] | None, ...]


def signature(folder: Path, names: Sequence[str]) -> Signature:
    """Differs when one of the files does."""
    found: list[tuple[int, int] | None] = []
    for name in names:
        try:
            stat = os.stat(folder / name)
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_size, stat.st_mtime_ns))
    return tuple(found)


class SlowAsk:
    """Asks SLURM for a job at most every ``ASK_S``; where it does not answer, for no job at all for so long."""

    def __init__(self, ask: Ask = show_job) -> None:
        self._ask, self._lock = ask, Lock()
        self._known: dict[str, tuple[float, JobState | None]] = {}
        self._failed: tuple[float, SftError] | None = None

    def __call__(self, job_id: str) -> JobState | None:
        with self._lock:
            now = time.monotonic()
            if self._failed is not None and now - self._failed[0] < ASK_S:
                raise self._failed[1]
            if job_id not in self._known or now - self._known[job_id][0] >= ASK_S:
                try:
                    self._known[job_id] = (now, self._ask(job_id))
                except SftError as error:
                    self._failed = (time.monotonic(), error)
                    raise
            return self._known[job_id][1]


@dataclass
class _Read:
    """
    Args:
        not_before: when its files may be read again; looked: when they were looked at. Both monotonic.
    """

    status: Status
    files: Signature
    looked: float
    read: float
    not_before: float


class Statuses:
    """The newest status of each run."""

    def __init__(self, *, ask: Ask | None = None) -> None:
        self._ask = ask or SlowAsk()
        self._known: dict[Path, _Read] = {}
        self._lock = Lock()

    def of(self, folders: Sequence[Path], *, budget_s: float | None = None) -> dict[Path, Status | None]:
        """
        Args:
            budget_s: for reading; None: as long as it takes.

        Returns:
            by folder; None: it has not been read yet, for want of time, or is no run any more.
        """
        with self._lock:
            clocks: dict[int, Clock] = {}
            ends = None if budget_s is None else time.monotonic() + budget_s
            return {folder: self._one(folder, clocks, ends) for folder in folders}

    def _one(self, folder: Path, clocks: dict[int, Clock], ends: float | None) -> Status | None:
        known, began = self._known.get(folder), time.monotonic()
        if known is not None and known.status.verdict.kind in OVER and began - known.looked < OVER_S:
            return known.status
        if ends is not None and began > ends:
            return None if known is None else known.status
        try:
            device = os.stat(folder).st_dev
            if device not in clocks:
                clocks[device] = clock_of(folder)
            files = signature(folder, OF_A_STATUS)
            asks_again = known is not None and known.status.job is not None and began - known.read >= ASK_S
            if known is not None and ((known.files == files and not asks_again) or began < known.not_before):
                known.status, known.looked = later(known.status, clocks[device]), began
                return known.status
            status = read_status(folder, clock=clocks[device], ask=self._ask)
        except (SftError, OSError):
            self._known.pop(folder, None)
            return None
        took_s = time.monotonic() - began
        self._known[folder] = _Read(status, files, began, began, began + took_s / MAX_SHARE)
        return status


@dataclass
class _ReadReport:
    data: ReportData
    files: Signature
    version: int
    not_before: float


class Reports:
    """What a report says of a run, of the few runs that were looked at last."""

    def __init__(self, *, ask: Ask | None = None) -> None:
        self._ask = ask or SlowAsk()
        self._known: OrderedDict[Path, _ReadReport] = OrderedDict()
        self._version, self._lock = 0, Lock()

    def of(self, folder: Path) -> tuple[int, ReportData]:
        """With a number that changes when the report does.

        Raises:
            ConfigError: the folder holds no run.
        """
        with self._lock:
            began, files = time.monotonic(), signature(folder, OF_A_REPORT)
            known = self._known.get(folder)
            if known is None or (known.files != files and began >= known.not_before):
                data = read_report(folder, ask=self._ask)
                self._version += 1
                took_s = time.monotonic() - began
                known = _ReadReport(data, files, self._version, began + took_s / MAX_SHARE)
                self._known[folder] = known
            self._known.move_to_end(folder)
            while len(self._known) > MAX_REPORTS:
                self._known.popitem(last=False)
            return known.version, known.data
