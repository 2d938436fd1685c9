"""Jobs that wait for each other, and sweeps, as ``sft-dist submit`` hands them to SLURM."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.cluster.chain import Link, submit_chain
from sft_dist.cluster.sweep_files import job_states, read_sweeps
from sft_dist.cluster.sweep_table import sweep_rows, to_csv
from sft_dist.errors import ConfigError
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SmallRun

pytestmark = pytest.mark.slurm

ON_CPUS = {
    "request_gpus": "none", "time_limit": "0:10:00", "memory_gib": 2, "cpus_per_gpu": 1, "doctor": False,
    "prepare": {"cpus": 1, "memory_gib": 2, "time_limit": "0:10:00"},
}  # fmt: skip


def submit(cluster: Cluster, folder: Path, file: Path, *options: str) -> tuple[dict[str, str], Path]:
    """SLURM's ids by what the jobs do, and the folder of the submission."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "submit", str(file), *options],
        cwd=folder, env=cluster.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    output = Path(json.loads(file.read_text())["output_dir"])
    (submission,) = (output / "slurm").glob("submission-*")
    record = json.loads((submission / "submission.json").read_text())
    for name, job in record["jobs"].items():
        assert f"{job} ({name})" in done.stdout
    return record["jobs"], submission


SLEEPY = "#!/bin/bash\n#SBATCH --output={folder}/%x-%j.out --open-mode=append --job-name={name}\n{body}\n"


def links(folder: Path, **bodies: str) -> list[Link]:
    for name, body in bodies.items():
        (folder / f"{name}.sbatch").write_text(SLEEPY.format(folder=folder, name=name, body=body))
    return [Link(name, folder / f"{name}.sbatch") for name in bodies]


def test_what_waits_for_a_requeued_job_goes_on_waiting(cluster: Cluster, tmp_path: Path) -> None:
    again = 'if [ -z "${SLURM_RESTART_COUNT:-}" ]; then scontrol requeue $SLURM_JOB_ID; sleep 60; fi'
    jobs = submit_chain(links(tmp_path, train=again, then="echo ran"))
    cluster.wait_for(lambda: cluster.show(jobs["train"])["Restarts"] == "1", 20, what="it is requeued")
    waiting = cluster.show(jobs["then"])
    assert (waiting["JobState"], waiting["Reason"]) == ("PENDING", "Dependency")
    ended = cluster.wait(jobs["then"], "COMPLETED", 60)
    assert ended["StartTime"] >= cluster.show(jobs["train"])["EndTime"]


def test_after_a_failure_nothing_waits(cluster: Cluster, tmp_path: Path) -> None:
    jobs = submit_chain(links(tmp_path, prepare="exit 4", train="echo ran", then="echo ran"))
    cluster.wait_for(
        lambda: not cluster.command("squeue", "--noheader", "--format=%A").strip(), 30, what="the queue is empty"
    )
    assert [cluster.show(jobs[name])["JobState"] for name in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert [path.name for path in tmp_path.glob("*.out")] == [f"prepare-{jobs['prepare']}.out"]


def test_where_a_later_job_is_refused_the_earlier_ones_are_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    chain = links(tmp_path, prepare="sleep 60", train="#SBATCH --partition=absent")
    with pytest.raises(
        ConfigError, match=r"the job `train` was not taken: .*partition.*the jobs before it were cancelled"
    ) as caught:
        submit_chain(chain)
    (job,) = re.findall(r"prepare (\d+)", caught.value.what)
    cluster.wait_for(lambda: cluster.show(job)["JobState"] == "CANCELLED", 20, what="it is cancelled")


def test_each_point_of_a_sweep_is_a_run_that_goes_on_by_itself(cluster: Cluster, small_run: SmallRun) -> None:
    notes: list[str] = []
    file, folder = small_run.write("sweep", cluster=ON_CPUS)
    jobs, _ = submit(
        cluster, small_run.folder, file, "--no-prepare", "--sweep", "train.max_steps=4,80", "--max-parallel", "2"
    )
    assert list(jobs) == ["train"]
    short, long = f"{jobs['train']}_0", f"{jobs['train']}_1"
    metrics = folder / "max_steps-80" / "metrics.jsonl"
    cluster.wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, 90, what="step 3", job=long)
    cluster.command("scancel", "--signal=USR1", long)
    states = job_states(read_sweeps(folder), notes)
    assert states["max_steps-80"] == "RUNNING"
    running = {row.point: row for row in sweep_rows(folder, job_states=states)}["max_steps-80"]
    assert running.state == "running"
    assert running.step is not None
    assert 3 <= running.step < 80
    cluster.wait(long, "COMPLETED", 90)
    assert cluster.show(long)["Restarts"] == "1"
    assert cluster.show(short)["JobState"] == "COMPLETED"
    assert cluster.show(short)["Restarts"] == "0", "an element is requeued by itself"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 81))
    rows = sweep_rows(folder, job_states=job_states(read_sweeps(folder), notes))
    assert [(row.point, row.state, row.step, row.num_steps) for row in rows] == [
        ("max_steps-4", "done", 4, 4), ("max_steps-80", "done", 80, 80),
    ]  # fmt: skip
    assert notes == []
    assert len(list(csv.reader(io.StringIO(to_csv(rows))))) == 3
    assert "resume" not in (folder / f"slurm/train-{short}.out").read_text()
    own = folder / "max_steps-80/slurm"
    assert json.loads((own / "submission-001/submission.json").read_text())["jobs"] == {"train": long}
    assert (own / f"train-{long}.out").read_text() == (folder / f"slurm/train-{long}.out").read_text()
    assert not (folder / "data_cache").exists()
