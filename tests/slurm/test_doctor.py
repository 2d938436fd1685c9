"""``srun sft-dist doctor`` on the nodes of a job, as the first step of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SmallRun

pytestmark = pytest.mark.slurm

# As in a job: training is a further step, on the same nodes, and begins only if nothing is wrong.
SCRIPT = """#!/bin/bash
export SFT_DIST_JOB_NOTES={notes}
code=0
srun --ntasks-per-node=1 python -m sft_dist doctor {config} --seconds 120 {options} || code=$?
echo "doctor: $code"
"""

CPU_NODES = {"cluster": {"request_gpus": "none"}, "hardware": {"gpus_per_node": 2}}


def doctor(cluster: Cluster, small_run: SmallRun, folder: Path, name: str, *options: str) -> tuple[dict[str, Any], str]:
    """What a job of two nodes finds, and what it prints."""
    config, run_directory = small_run.write(name, **CPU_NODES)
    run_directory.mkdir(exist_ok=True)
    output = folder / "job.out"
    script = SCRIPT.format(notes=folder / "notes", config=config, options=" ".join(options))
    job = cluster.submit(script, "--nodes=2", "--exclude=n3", f"--output={output}")
    cluster.wait(job, "COMPLETED", 180)
    assert list(run_directory.iterdir()) == []
    return json.loads((folder / "notes" / "doctor.json").read_text()), output.read_text()


def test_healthy_nodes(cluster: Cluster, small_run: SmallRun, tmp_path: Path) -> None:
    found, printed = doctor(cluster, small_run, tmp_path, "healthy")
    # Both nodes are this machine: what else runs on it may take a core from one of them, which is found then, rightly.
    wrong = {finding["check"] for finding in found["findings"] if finding["level"] != "ok"}
    assert wrong <= {"straggler"}, printed
    verdict = "warning" if wrong else "ok"
    assert (found["verdict"], found["nodes"], found["failed_nodes"]) == (verdict, ["n1", "n2"], []), printed
    checks = {finding["check"] for finding in found["findings"]}
    assert {
        "output_dir",
        "shared folder",
        "clock",
        "host names",
        "port",
        "straggler",
        "network",
        "all-reduce",
    } <= checks
    lines = printed.splitlines()
    assert lines[-1] == "doctor: 0"
    assert sum(line.startswith(f"verdict: {verdict}  2 nodes") for line in lines) == 1
    assert cluster.left_running() == []


def test_a_node_that_cannot_write_the_run_directory(cluster: Cluster, small_run: SmallRun, tmp_path: Path) -> None:
    _, run_directory = small_run.write("read_only", **CPU_NODES)
    run_directory.mkdir()
    cluster.run_on("n2", "mount", "--bind", str(run_directory), str(run_directory))
    try:
        cluster.run_on("n2", "mount", "-o", "remount,bind,ro", str(run_directory))
        found, printed = doctor(cluster, small_run, tmp_path, "read_only", "--no-speed")
    finally:
        cluster.run_on("n2", "umount", "-l", str(run_directory))
    assert found["failed_nodes"] == ["n2"]
    wrong = [(f["node"], f["check"], f["level"]) for f in found["findings"] if f["level"] != "ok"]
    assert wrong == [("n2", "output_dir", "failed")]
    assert "Read-only file system" in printed
    assert printed.splitlines()[-1] == "doctor: 7"
    assert printed.count("error: training would fail: n2: output_dir") == 1
