"""What breaks under a training job: it goes on from its last checkpoint, or ends in a state that says why."""

from __future__ import annotations

import os
import signal
import time

import pytest

from sft_dist.checkpoint.naming import complete_checkpoints, newest_step
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SmallRun
from tests.slurm.training import LAUNCHER, RANK, Job, submit_training

pytestmark = pytest.mark.slurm

STEPS, EVERY = 4000, 5
NO_HANG_S = 60


def strike(job: Job, started: int, *, least: int) -> tuple[int, float]:
    """Waits until a start has saved something of its own; the newest step then, and the time."""
    job.wait_for_start(started)
    job.cluster.wait_for(lambda: newest_step(job.output) > least, 90, what=f"more than step {least}", job=job.id)
    return newest_step(job.output), time.monotonic()


def test_processes_and_nodes_that_are_lost_cost_no_checkpoint(cluster: Cluster, small_run: SmallRun) -> None:
    config, output = small_run.write(
        "faults", train={"max_steps": STEPS}, checkpoint={"every_steps": EVERY, "keep_last": 2}
    )
    job = submit_training(cluster, config, output, "--time=20", processes=1, max_restarts=3)

    # A rank on the second node.
    saved, struck = strike(job, 1, least=0)
    [victim] = job.processes(RANK, "n2")
    os.kill(victim, signal.SIGKILL)
    cluster.wait_for(lambda: job.attempts()[0].decision, NO_HANG_S, what="the end of start 1", job=job.id)
    print(f"rank killed: over after {time.monotonic() - struck:.0f} s")
    first = job.attempts()[0]
    assert (first.code, first.decision) == (137, "requeue")
    assert (first.step_after or 0) >= saved

    # The launcher of the first node.
    saved, struck = strike(job, 2, least=first.step_after or 0)
    [victim] = job.processes(LAUNCHER, "n1")
    os.kill(victim, signal.SIGKILL)
    cluster.wait_for(lambda: job.attempts()[1].decision, NO_HANG_S, what="the end of start 2", job=job.id)
    print(f"launcher killed: over after {time.monotonic() - struck:.0f} s")
    second = job.attempts()[1]
    assert (second.code, second.decision) == (137, "requeue")
    assert (second.step_after or 0) >= saved
    cluster.wait(job.id, "PENDING", 30)
    assert cluster.left_running() == []

    # The power of the first node, with the job's script.
    saved, struck = strike(job, 3, least=second.step_after or 0)
    cluster.cut("n1")
    cluster.wait(job.id, "PENDING", NO_HANG_S)
    print(f"power cut: requeued after {time.monotonic() - struck:.0f} s")
    assert newest_step(output) >= saved
    assert job.attempts()[2].is_open

    # It goes on on the nodes that are left, and knows what became of the third start.
    saved, _ = strike(job, 4, least=newest_step(output))
    third, fourth = job.attempts()[2:]
    assert (third.decision, third.blamed, third.code, third.ended) == ("lost", ("n1",), None, None)
    assert fourth.nodes == ("n2", "n3")
    assert fourth.step_before == third.step_after
    cluster.command("scancel", job.id)
    assert cluster.wait(job.id, "CANCELLED", 30)["Restarts"] == "3"
    # Where SLURM ended the script before that could tell, too.
    assert job.attempts()[3].decision in (None, "leave")
    assert newest_step(output) >= saved
    assert len(complete_checkpoints(output / "checkpoints")) == 2
    assert [line["step"] for line in job.lines()] == list(range(1, job.last_step() + 1))
    cluster.wait_for(lambda: not cluster.left_running(), 15, what="nothing is left", job=job.id)
    assert "Traceback" not in job.said().split("start 4 of the job")[1]
