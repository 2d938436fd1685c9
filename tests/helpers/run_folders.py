"""Run directories as a run leaves them at some moment, and jobs as SLURM tells of them, without a run and without SLURM."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sft_dist.checkpoint.manifest import MANIFEST, Identity, Manifest, Position
from sft_dist.checkpoint.store import name_of
from sft_dist.cluster import slurm
from sft_dist.cluster.file_clock import Clock
from sft_dist.metrics.heartbeat import HEARTBEAT, Beat

# When it is in these folders, by the clock of the file system.
NOW = datetime(2026, 3, 4, 12, 30, tzinfo=UTC)
CLOCK = Clock(NOW.timestamp())

STEP_S = 15.0


def iso(ago_s: float, *, skew_s: float = 0.0) -> str:
    """By the clock of a node that is ``skew_s`` ahead of the file system's."""
    return (NOW - timedelta(seconds=ago_s - skew_s)).isoformat(timespec="milliseconds")


def beat(
    folder: Path, *, ago_s: float = 2.0, skew_s: float = 0.0, step_ago_s: float | None = None, **fields: Any
) -> Beat:
    """Writes a heartbeat; without more, of a run that trains, at step 120 of 900."""
    known = Beat(
        phase="training", phase_since=iso(3000, skew_s=skew_s), started=iso(3600, skew_s=skew_s),
        written_at=iso(ago_s, skew_s=skew_s), host="gpu-3", pid=4242, strategy="fsdp2", world_size=16, step=120,
        num_steps=900, step_at=iso(ago_s + 2 if step_ago_s is None else step_ago_s, skew_s=skew_s), step_s=STEP_S,
    )  # fmt: skip
    written = replace(known, **fields)
    put(folder / HEARTBEAT, json.dumps(asdict(written)), ago_s=ago_s)
    return written


def put(path: Path, text: str, *, ago_s: float) -> None:
    """A file as it was written so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (NOW.timestamp() - ago_s,) * 2)


def metrics(
    folder: Path, *, steps: int = 120, ago_s: float = 4.0, cut: str = "", priced: bool = True, **fields: Any
) -> None:
    """Losses that fall from 2.5, an evaluation every 50 steps; 10 $ an hour.

    Args:
        cut: what a dying process wrote of one more line.
        fields: of the last line.
    """
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        elapsed_s = 600 + step * STEP_S
        lines.append(
            {"step": step, "loss": 0.8 + 1.7 / step**0.5, "tokens_per_s": 13_500.0, "step_time_s": 14.2, "mfu": 0.41,
             "elapsed_s": elapsed_s} | ({"cost_usd": elapsed_s / 360} if priced else {})
        )  # fmt: skip
        if step % 50 == 0:
            lines.append({"step": step, "eval_loss": 1.0 + 5 / step, "eval_perplexity": 3.0})
    lines[-1] |= fields
    put(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + cut, ago_s=ago_s)


def receipt(folder: Path, *, finished: bool = False, priced: bool = True, **last: Any) -> None:
    """Of a run whose only session began an hour ago; ``last`` changes it."""
    session = {"started": iso(3590), "first_step": 1, "elapsed_s": 600.0, "cost_usd": 600 / 360, "ended": finished,
               "preempted_by": None} | last  # fmt: skip
    price = {"usd": 10.0, "jpy_per_usd": 150.0, "name": "2 x p4d.24xlarge"}
    if not priced:
        session["cost_usd"], price = None, None  # type: ignore[assignment]
    document = {"format": 1, "finished": finished, "planned": {"steps": 900}, "price": price, "sessions": [session]}
    put(folder / "receipt.json", json.dumps(document), ago_s=600)


def checkpoint(folder: Path, step: int, *, ago_s: float) -> Path:
    """One that is complete, of a state without tensors."""
    path = folder / "checkpoints" / name_of(step)
    manifest = Manifest(
        position=Position(completed_steps=step), strategy="fsdp2", world_size=16, identity=Identity(values={}),
        tensors={}, files={},
    )  # fmt: skip
    put(path / MANIFEST, manifest.text(), ago_s=ago_s)
    return path


def training(folder: Path, **fields: Any) -> Path:
    """All that a run in progress has; ``fields`` of its heartbeat."""
    beat(folder, **fields)
    metrics(folder)
    receipt(folder)
    put(folder / "config.yaml", "checkpoint:\n  prove_final: true\n", ago_s=3600)
    for step in (50, 100):
        checkpoint(folder, step, ago_s=(120 - step) * STEP_S)
    return folder


def submitted(folder: Path, job_id: int = 4711) -> None:
    """What a submission records of its jobs."""
    put(folder / "slurm" / "submission-001" / "submission.json", json.dumps({"jobs": {"train": job_id}}), ago_s=7200)


def job(state: str, *, job_id: str = "4711", reason: str = "None", restarts: int = 0, **fields: str) -> slurm.JobState:
    """What ``scontrol show job`` tells of a job, read as it is read in earnest.

    Args:
        fields: of scontrol, in place of those here.
    """
    record = {
        "JobId": job_id, "JobName": "llama", "JobState": state, "Reason": reason, "Requeue": "1",
        "Restarts": str(restarts), "ExitCode": "0:0", "TimeLimit": "04:00:00", "SubmitTime": "2026-03-04T10:30:00",
        "StartTime": "Unknown", "EndTime": "Unknown", "Partition": "main", "NodeList": "(null)",
    }  # fmt: skip
    if state == "RUNNING":
        record |= {"StartTime": "2026-03-04T11:30:00", "EndTime": "2026-03-04T15:30:00", "NodeList": "gpu-3,gpu-4"}
    line = " ".join(f"{key}={value}" for key, value in (record | fields).items())
    return slurm._job(slurm.parse_record(line))


def attempt(folder: Path, restart: int, *, ago_s: float, step: int, **end: Any) -> None:
    """Notes a start of job 4711 on two nodes, and its end after half an hour where ``end`` says how it ended."""
    start = {"job": "4711", "restart": restart}
    began = {"event": "began", **start, "at": NOW.timestamp() - ago_s, "nodes": ["gpu-3", "gpu-4"], "step": step}
    lines = [began]
    if end:
        known = {"at": NOW.timestamp() - ago_s + 1800, "code": 75, "step": step, "reason": "", "blamed": []}
        lines.append({"event": "ended", **start} | known | end)
    path = folder / "slurm" / "attempts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
