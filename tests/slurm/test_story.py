"""The whole story: submitted, prepared, trained, interrupted by its time limit and by another job, done, exported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sft_dist.checkpoint.naming import newest_step
from sft_dist.cluster.logs import Choice, show_logs
from sft_dist.cluster.status import Status, read_status
from sft_dist.runtime import exit_notes
from tests.helpers import figures
from tests.helpers.fake_hub import FakeHub
from tests.helpers.offline_wandb import offline_runs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY, SmallRun
from tests.slurm.training import Job, was_sent

pytestmark = pytest.mark.slurm

STEPS = 120

ON_CPUS = {"request_gpus": "none", "memory_gib": 2, "cpus_per_gpu": 1, "time_limit": "0:10:00", "signal_before_s": 60}
SIDE_JOB = {"cpus": 1, "memory_gib": 2, "time_limit": "0:10:00"}


def submit(cluster: Cluster, folder: Path, file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As from a login node whose environment is not active, and may ask the hub."""
    shell = {
        name: value for name, value in cluster.environment.items() if name not in ("VIRTUAL_ENV", "HF_HUB_OFFLINE")
    }
    shell |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "sft_dist", "submit", str(file), *options], env=shell, cwd=folder, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


def test_interrupted_again_and_again_a_run_ends_as_if_nothing_had_happened(
    cluster: Cluster, small_run: SmallRun, tiny_base: Path, tmp_path: Path
) -> None:
    sections = {"train": {"max_steps": STEPS}, "checkpoint": {"every_steps": 1000, "prove_final": True}}
    alone, alone_output = small_run.write("alone", **sections)
    cache = tmp_path / "data_cache"
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "HF_HUB_OFFLINE"):
        cluster.job_environment.pop(name, None)
    with FakeHub(tiny_base, host=cluster.outside) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": cluster.outside}
        file, output = small_run.write(
            "story",
            **sections,
            model={"path": "org/tiny"},
            data={"cache_dir": str(cache)},
            logging={"wandb": {"mode": "offline"}},
            hardware={"nodes": 2, "gpus_per_node": 2},
            cluster=ON_CPUS
            | {"environment": online, "prepare": SIDE_JOB}
            | {"then": SIDE_JOB | {"command": "export {run} --merge --no-check"}},
        )
        began = time.monotonic()
        asked = submit(cluster, small_run.folder, file, "--test-only")
        assert (asked.returncode, asked.stdout.count("to start at")) == (0, 3), asked.stderr
        assert not list(output.glob("slurm/*"))
        done = submit(cluster, small_run.folder, file)
        assert done.returncode == 0, done.stdout + done.stderr
        jobs: dict[str, str] = json.loads((output / "slurm/submission-001/submission.json").read_text())["jobs"]
        assert list(jobs) == ["prepare", "train", "then"]
        assert f"submitted jobs {', '.join(f'{number} ({name})' for name, number in jobs.items())}" in done.stdout
        again = submit(cluster, small_run.folder, file)
        assert again.returncode == 2
        assert f"job {jobs['prepare']} (prepare) of" in again.stderr, "it is in the queue"
        shown = cluster.show(jobs["train"])
        assert {name: shown[name] for name in ("JobName", "NumTasks", "MinMemoryNode", "StdOut")} == {
            "JobName": "story", "NumTasks": "2", "MinMemoryNode": "2G",
            "StdOut": str(output / f"slurm/train-{jobs['train']}.out"),
        }  # fmt: skip
        job = Job(cluster, jobs["train"], output)

        def until(wanted: Callable[[Status], bool], what: str) -> Status:
            """How the run stands, read from its folder and from SLURM."""
            cluster.wait_for(lambda: wanted(read_status(output)), 90, what=what, job=job.id)
            return read_status(output)

        assert "waiting" in read_status(output).verdict.line, "for the job that prepares"
        cluster.wait(jobs["prepare"], "COMPLETED", 180)
        requests = hub.requests
        assert requests > 0, "the model came from the hub"
        assert "GB of weights fetched" in (output / f"slurm/prepare-{jobs['prepare']}.out").read_text()

        # USR1 before the time limit, which is only set when it trains: SLURM sends it up to a minute early.
        job.wait_for_step(3)
        trains = read_status(output)
        assert trains.verdict.kind == "working"
        assert trains.job is not None
        assert trains.job.state is not None
        assert (trains.job.state.state, trains.job.state.nodes) == ("RUNNING", ("n1", "n2"))
        with job.held() as ranks:
            assert len(ranks) == 4
            limit_minutes = int(time.time() - start_of(cluster, job) + 30) // 60 + 1
            cluster.command("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit_minutes}")
            # Meanwhile nothing else computes.
            uninterrupted = subprocess.Popen(
                [sys.executable, "-m", "sft_dist", "train", str(alone)], env=cluster.environment, cwd=REPOSITORY,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            cluster.wait_for(lambda: all(was_sent(pid, signal.SIGUSR1) for pid in ranks), 90, what="USR1", job=job.id)
        waits = until(lambda status: "waiting to start again" in status.verdict.line, "it waits")
        assert waits.step is not None
        print(f"requeued after {time.monotonic() - began:.0f} s")
        [first] = job.attempts()
        assert (first.code, first.decision, first.nodes, first.blamed) == (75, "requeue", ("n1", "n2"), ())
        assert first.step_before == 0
        assert exit_notes.read(output / f"slurm/notes/{job.id}-0") == {0: [75], 1: [75]}
        assert 3 <= (first.step_after or 0) < STEPS
        assert newest_step(output) == first.step_after == job.last_step() == waits.step
        cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
        wandb_id = (output / "wandb/run_id").read_text()
        try:
            _, problems = uninterrupted.communicate(timeout=200)
        finally:
            uninterrupted.kill()
        assert uninterrupted.returncode == 0, problems
        assert cluster.show(jobs["then"])["Reason"] == "Dependency", "it waits for the job, however often that starts"

        # Preempted.
        job.wait_for_step(first.step_after + 2)
        with job.held() as ranks:
            urgent = cluster.submit("#!/bin/bash\nsleep 1", "--partition=high", "--nodes=3", "--exclusive")
            # SLURM lets them go on and sends SIGTERM to all: the launchers, the ranks, W&B's process.
            cluster.wait_for(lambda: all(was_sent(pid, signal.SIGTERM) for pid in ranks), 40, what="TERM", job=job.id)
        cluster.wait_for(lambda: len(job.attempts()) > 1 and job.attempts()[1].decision, 40, what="end", job=job.id)
        cluster.wait(urgent, "COMPLETED", 60)
        second = job.attempts()[1]
        assert (second.code, second.decision, second.restart) == (75, "requeue", 1)
        assert second.reason == "preempted: its nodes are wanted by another job"
        assert second.step_before == first.step_after
        assert (second.step_after or 0) >= first.step_after + 2
        assert newest_step(output) == second.step_after

        # Done, and exported.
        ended = cluster.wait(job.id, "COMPLETED", 240)
        print(f"done after {time.monotonic() - began:.0f} s\n{job.said()}")
        cluster.wait(jobs["then"], "COMPLETED", 180)
        assert hub.requests == requests, "nobody asked the hub any more"
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "2")
    assert [one.decision for one in job.attempts()] == ["requeue", "requeue", "done"]
    assert cluster.left_running() == []
    check_the_result(job, alone_output, wandb_id)
    check_that_nothing_was_prepared_again(output, cache, job)

    finished = read_status(output)
    assert (finished.verdict.kind, finished.step) == ("finished", STEPS)
    assert finished.verdict.line.startswith(f"finished after {STEPS} steps")
    assert finished.found.bill is not None
    assert finished.found.bill.starts == 3
    shown_log = tmp_path / "log"
    with shown_log.open("wb") as file_of_log:
        show_logs(output, Choice(of_job=True), out=file_of_log)
    assert job.said().endswith(shown_log.read_text())
    assert f"job {job.id}: start 3 of the job" in shown_log.read_text()
    with safe_open(output / "merged" / "model.safetensors", "pt") as merged:  # type: ignore[no-untyped-call]
        names = list(merged.keys())
    assert names
    assert not [name for name in names if "lora" in name]

    # Put back into the queue although it is done: nothing is trained.
    cluster.command("scontrol", "requeue", job.id)
    cluster.wait(job.id, {"PENDING", "RUNNING"}, 20)
    assert cluster.wait(job.id, "COMPLETED", 60)["Restarts"] == "3"
    assert job.said().endswith(f"job {job.id}: {output} is done: nothing to train\n")
    assert len(job.attempts()) == 3


def check_the_result(job: Job, alone: Path, wandb_id: str) -> None:
    """One run: each step once, the numbers of an uninterrupted one, one run of W&B."""
    assert (job.output / "final").is_dir()
    assert [line["step"] for line in job.lines()] == list(range(1, STEPS + 1))
    reference = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    both = [
        np.array([[one["loss"], one["grad_norm"]] for one in lines if "loss" in one])
        for lines in (job.lines(), reference)
    ]
    figures.difference("interrupted on two nodes against one process", *both)
    np.testing.assert_allclose(*both, rtol=1e-5)
    starts = offline_runs(job.output)
    assert {one.id for one in starts} == {wandb_id} == {(job.output / "wandb/run_id").read_text()}
    assert starts[-1].steps == list(range(1, STEPS + 1))
    assert [one.exit_code for one in starts if one.exit_code is not None] == [1, 1, 0]
    said = job.said()
    assert said.count("verdict: ok") == 3, "doctor looked at the nodes before each start"
    assert said.count(": requeue, at step") == 2
    assert said.count("preempted by SIGUSR1") == said.count("preempted by SIGTERM") == 1
    assert "Traceback" not in said
    assert "[c10d]" not in said
    assert "W&B takes nothing more" not in said


def check_that_nothing_was_prepared_again(output: Path, cache: Path, job: Job) -> None:
    first_start = job.attempts()[0].began
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.relative_to(cache).parts[0] for path in files} >= {"tokens", "sets", "audits"}
    newer = [path for path in files if max(path.stat().st_mtime, path.stat().st_ctime) > first_start]
    assert newer == [], "the training prepared nothing"
    identity = json.loads((output / "receipt.json").read_text())["identity"]["data.train"]
    [meta] = (cache / "sets").glob("*/meta.json")
    assert json.loads(meta.read_text())["digest"] in identity


def start_of(cluster: Cluster, job: Job) -> float:
    """When the job's last start began, seconds since 1970."""
    return time.mktime(time.strptime(cluster.show(job.id)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
