"""A training job's life: saved before its time limit and for another job's sake, started again, done once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sft_dist.checkpoint.naming import newest_step
from tests.helpers import figures
from tests.helpers.offline_wandb import offline_runs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SmallRun
from tests.slurm.training import submit_training, was_sent

pytestmark = pytest.mark.slurm

STEPS = 150


def test_interrupted_again_and_again_a_run_ends_as_if_nothing_had_happened(
    cluster: Cluster, small_run: SmallRun
) -> None:
    sections = {
        "train": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 1000, "prove_final": True},
        "logging": {"wandb": {"mode": "offline"}},
    }
    config, output = small_run.write("interrupted", **sections)
    alone, alone_output = small_run.write("alone", **(sections | {"logging": {"wandb": {"mode": "disabled"}}}))
    began = time.monotonic()
    job = submit_training(cluster, config, output, "--time=10", "--signal=USR1@60")

    # USR1 before the time limit, which is only set when it trains: SLURM sends it up to a minute early.
    job.wait_for_step(3)
    with job.held() as ranks:
        assert len(ranks) == 4
        limit_minutes = int(time.monotonic() - began + 30) // 60 + 1
        cluster.command("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit_minutes}")
        # Meanwhile nothing else computes.
        uninterrupted = subprocess.Popen(
            [sys.executable, "-m", "sft_dist", "train", str(alone)], env=cluster.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        cluster.wait_for(lambda: all(was_sent(pid, signal.SIGUSR1) for pid in ranks), 50, what="USR1", job=job.id)
    cluster.wait(job.id, "PENDING", 30)
    print(f"requeued after {time.monotonic() - began:.0f} s")
    [first] = job.attempts()
    assert (first.code, first.decision, first.nodes, first.blamed) == (75, "requeue", ("n1", "n2"), ())
    assert first.step_before == 0
    assert 3 <= (first.step_after or 0) < STEPS
    assert newest_step(output) == first.step_after == job.last_step()
    cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    wandb_id = (output / "wandb/run_id").read_text()
    try:
        _, problems = uninterrupted.communicate(timeout=200)
    finally:
        uninterrupted.kill()
    assert uninterrupted.returncode == 0, problems

    # Preempted.
    job.wait_for_step(first.step_after + 2)
    with job.held() as ranks:
        urgent = cluster.submit("#!/bin/bash\nsleep 1", "--partition=high", "--nodes=3", "--exclusive")
        # SLURM lets them go on and sends SIGTERM to all: the launchers, the ranks, W&B's process.
        cluster.wait_for(lambda: len(job.attempts()) > 1 and job.attempts()[1].decision, 40, what="end", job=job.id)
    cluster.wait(urgent, "COMPLETED", 60)
    second = job.attempts()[1]
    assert (second.code, second.decision, second.restart) == (75, "requeue", 1)
    assert second.reason == "preempted: its nodes are wanted by another job"
    assert second.step_before == first.step_after
    assert (second.step_after or 0) >= first.step_after + 2
    assert newest_step(output) == second.step_after

    # Done.
    ended = cluster.wait(job.id, "COMPLETED", 90)
    print(f"done after {time.monotonic() - began:.0f} s\n{job.said()}")
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "2")
    assert [one.decision for one in job.attempts()] == ["requeue", "requeue", "done"]
    assert cluster.left_running() == []
    assert (output / "final").is_dir()
    assert [line["step"] for line in job.lines()] == list(range(1, STEPS + 1))
    reference = [json.loads(line) for line in (alone_output / "metrics.jsonl").read_text().splitlines()]
    both = [
        np.array([[one["loss"], one["grad_norm"]] for one in lines if "loss" in one])
        for lines in (job.lines(), reference)
    ]
    figures.difference("interrupted on two nodes against one process", *both)
    np.testing.assert_allclose(*both, rtol=1e-5)
    starts = offline_runs(output)
    assert {one.id for one in starts} == {wandb_id} == {(output / "wandb/run_id").read_text()}
    assert starts[-1].steps == list(range(1, STEPS + 1))
    assert [one.exit_code for one in starts if one.exit_code is not None] == [1, 1, 0]
    said = job.said()
    assert said.count(": requeue, at step") == 2
    assert said.count("preempted by SIGUSR1") == said.count("preempted by SIGTERM") == 1
    assert "Traceback" not in said
    assert "W&B stopped" not in said

    # Put back into the queue although it is done: nothing is trained.
    cluster.command("scontrol", "requeue", job.id)
    cluster.wait(job.id, {"PENDING", "RUNNING"}, 20)
    assert cluster.wait(job.id, "COMPLETED", 60)["Restarts"] == "3"
    assert job.said().endswith(f"job {job.id}: {output} is done: nothing to train\n")
    assert len(job.attempts()) == 3
