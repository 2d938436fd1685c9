"""What breaks under a training job: it goes on from its last checkpoint, or ends in a state that says why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from sft_dist.checkpoint.naming import complete_checkpoints, newest_step
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SmallRun
from tests.slurm.training import LAUNCHER, RANK, Job, submit_script, submit_training

pytestmark = pytest.mark.slurm

STEPS, EVERY = 4000, 5
NO_HANG_S = 60


def strike(job: Job, started: int, *, least: int) -> tuple[int, float]:
    """Waits until a start has saved something of its own; the newest step then, and the time."""
    job.wait_for_start(started)
    job.cluster.wait_for(lambda: newest_step(job.output) > least, 180, what=f"more than step {least}", job=job.id)
    return newest_step(job.output), time.monotonic()


def test_processes_nodes_and_daemons_that_are_lost_cost_no_checkpoint(cluster: Cluster, small_run: SmallRun) -> None:
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
    assert (second.code, second.decision, second.blamed) == (137, "requeue", ("n1",))  # the other lost its peer
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

    # SLURM's daemon of the second node, which cannot end its processes then.
    cluster.kill_slurmd("n3")
    struck = time.monotonic()
    cluster.wait(job.id, "PENDING", NO_HANG_S)
    print(f"daemon killed: requeued after {time.monotonic() - struck:.0f} s")
    cluster.start_slurmd("n3")
    saved, _ = strike(job, 5, least=newest_step(output))
    fourth, fifth = job.attempts()[3:]
    # SLURM ends the job's script, too, which may still come to tell of its end.
    assert fourth.decision in ("lost", "requeue", "leave")
    assert fourth.blamed == ("n3",), job.said()
    assert (fifth.nodes, fifth.step_before) == (("n2", "n3"), fourth.step_after)

    cluster.command("scancel", job.id)
    assert cluster.wait(job.id, "CANCELLED", 30)["Restarts"] == "4"
    # Where SLURM ended the script before that could tell, too.
    assert job.attempts()[4].decision in (None, "leave")
    assert newest_step(output) >= saved
    assert len(complete_checkpoints(output / "checkpoints")) == 2
    assert [line["step"] for line in job.lines()] == list(range(1, job.last_step() + 1))
    cluster.wait_for(lambda: not cluster.left_running(), 15, what="nothing is left", job=job.id)
    assert "Traceback" not in job.said().split("start 5 of the job")[1]


CRASHES_ON_N2 = """bash -c '
cd $SFT_DIST_JOB_NOTES
hostname > began-$SLURM_NODEID
case $(hostname) in n2) code=137 ;; n3) code=0 ;; *) code=$([ -e ../all-is-well ] && echo 0 || echo 1) ;; esac
echo $code > exit-$SLURM_NODEID
exit $code'"""
WAITS = """bash -c 'trap "exit 75" TERM; sleep 100 & wait'"""


def test_what_cannot_go_on_ends_and_says_why(cluster: Cluster, tmp_path: Path) -> None:
    """Steps that fail in place of trainings: what is decided about them is the same."""
    hopeless = submit_script(cluster, tmp_path / "hopeless", "false", max_restarts=1)
    cancelled = submit_script(cluster, tmp_path / "cancelled", WAITS)
    crashing = submit_script(cluster, tmp_path / "crashing", CRASHES_ON_N2)
    cluster.wait_for(lambda: "Exited with exit code 1\n" in crashing.said(), 20, what="a crash", job=crashing.id)

    # Cancelled: it stays so.
    cancelled.wait_for_start(1)
    time.sleep(1)
    cluster.command("scancel", cancelled.id)
    assert cluster.wait(cancelled.id, "CANCELLED", 30)["Restarts"] == "0"
    cluster.wait_for(lambda: cancelled.attempts()[0].decision, 10, what="its end", job=cancelled.id)
    [only] = cancelled.attempts()
    assert (only.code, only.decision) == (75, "leave")
    assert f"job {cancelled.id}: leave, at step 0: the job is completing: cancelled" in cancelled.said()

    # Started again once, to no avail.
    ended = cluster.wait(hopeless.id, "FAILED", 60)
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "1")
    assert [(one.code, one.decision) for one in hopeless.attempts()] == [(1, "requeue"), (1, "give up")]
    line = f"job {hopeless.id}: give up, at step 0: 2 starts in a row got no further than the last checkpoint\n"
    assert hopeless.said().endswith(line)

    # Twice on the same node: a third time without it.
    crashing.wait_for_start(3, 90)
    (crashing.output / "slurm/notes/all-is-well").touch()
    first, second, third = crashing.attempts()
    assert [one.nodes for one in (first, second, third)] == [("n1", "n2"), ("n1", "n2"), ("n1", "n3")]
    assert [(one.code, one.blamed) for one in (first, second)] == [(137, ("n2",)), (137, ("n2",))]
    assert f"job {crashing.id}: without n2 from now on: failed 2 times\n" in crashing.said()
    assert cluster.show(crashing.id)["ExcNodeList"] == "n2"
    assert cancelled.id not in cluster.command("squeue", "--noheader", "--format=%A")
