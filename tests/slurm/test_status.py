"""A job seen from outside by ``sft-dist status`` and ``logs``: held, in training, requeued, finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.cluster import slurm
from sft_dist.cluster.logs import Choice, show_logs
from sft_dist.cluster.status import Status, read_status
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SmallRun

pytestmark = pytest.mark.slurm

JOB = """#!/bin/bash
#SBATCH --ntasks=1 --time=1:00:00 --requeue --open-mode=append --hold
echo "start ${SLURM_RESTART_COUNT:-0}"
srun python -m sft_dist train "$1" --resume auto
"""


def test_a_job_from_outside(cluster: Cluster, small_run: SmallRun, tmp_path: Path) -> None:
    config, run = small_run.write("watched", train={"max_steps": 150}, checkpoint={"every_steps": 10, "keep_last": 2})
    (run / "slurm").mkdir(parents=True)
    script = tmp_path / "job.sh"
    script.write_text(JOB)
    job = slurm.submit(script, f"--output={run}/slurm/train-%j.out", arguments=[str(config)])
    submission = run / "slurm" / "submission-001" / "submission.json"
    submission.parent.mkdir()
    submission.write_text(f'{{"jobs": {{"train": {job}}}}}')

    def until(wanted: Callable[[Status], bool], what: str) -> Status:
        seen: list[str] = []
        deadline = time.monotonic() + 60
        while not wanted(found := read_status(run)):
            if found.verdict.line not in seen:
                seen.append(found.verdict.line)
            assert time.monotonic() < deadline, f"{what}: {seen}\n{cluster.logs()}"
            time.sleep(0.05)
        return found

    held = read_status(run)
    assert held.verdict.line == f"held in the queue (JobHeldUser): `scontrol release {job}` lets it go"
    cluster.command("scontrol", "release", job)
    trains = until(lambda s: s.verdict.kind == "working" and (s.step or 0) > 10, "it trains")
    assert trains.job is not None
    assert trains.job.state is not None
    assert trains.found.pulse is not None
    beat = trains.found.pulse.beat
    assert (trains.job.state.state, trains.job.state.nodes) == ("RUNNING", (beat.host,))
    assert (beat.job_id, beat.restart, beat.num_steps) == (job, 0, 150)
    slurm.requeue(job)
    waits = until(lambda s: "waiting to start again" in s.verdict.line, "it waits")
    assert waits.verdict.line.startswith("interrupted at step ")
    # The heartbeat of the start before is not taken for one of this start.
    again = until(lambda s: s.found.pulse is not None and s.found.pulse.beat.restart == 1, "it starts again")
    assert again.job is not None
    assert again.job.state is not None
    assert again.job.state.restarts == 1
    finished = until(lambda s: s.verdict.kind == "finished", "it is finished")
    assert finished.step == 150
    assert finished.found.bill is not None
    assert finished.found.bill.starts == 2
    cluster.wait(job, "COMPLETED", 20)
    assert read_status(run).verdict.line.startswith("finished after 150 steps")
    out = tmp_path / "shown"
    with out.open("wb") as file:
        show_logs(run, Choice(of_job=True), out=file)
    shown = out.read_text()
    assert shown.startswith("start 0\n")
    assert "start 1\n" in shown
    assert "saved " in shown
