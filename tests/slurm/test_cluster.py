"""The cluster of these tests is one: nodes of their own, and SLURM's answers as ``sft_dist.cluster.slurm`` reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.cluster import slurm
from sft_dist.errors import ConfigError
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

LOOKS = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --time=1:00:00 --requeue --exclude=n3
srun bash -c 'echo "$SLURM_NODEID $SLURM_PROCID $(hostname) $(getent hosts n2 | cut -d" " -f1) $PYTHONPATH"'
srun --nodes=2 --ntasks=2 bash -c 'echo $SLURM_NODEID > /dev/shm/mine; ls /dev/shm | wc -l'
sleep 30
"""


def test_nodes_jobs_and_what_slurm_says_of_them(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "a job.out"
    job = cluster.submit(LOOKS, f"--output={output}", "--job-name=two words")

    def said() -> list[str]:
        """Without what srun says where a node is still busy with the step before."""
        text = output.read_text() if output.exists() else ""
        return sorted((line for line in text.splitlines() if not line.startswith("srun: ")), key=len)

    cluster.wait_for(lambda: len(said()) >= 6, 20, what="output", job=job)
    repository, n2 = cluster.job_environment["PYTHONPATH"], cluster.address("n2")
    lines = said()
    assert sorted(lines[2:]) == [f"{p // 2} {p} n{p // 2 + 1} {n2} {repository}" for p in range(4)]
    assert lines[:2] == ["1", "1"]  # each sees its own /dev/shm
    shown = slurm.show_job(job)
    assert shown is not None
    assert (shown.job_id, shown.name, shown.state, shown.nodes) == (job, "two words", "RUNNING", ("n1", "n2"))
    assert (shown.excluded, shown.restarts, shown.may_requeue, shown.time_limit_s) == (("n3",), 0, True, 3600)
    assert shown.output == output
    assert shown.started is not None
    assert shown.ended is not None
    assert (shown.ended - shown.started).total_seconds() == 3600
    assert any(line.endswith("sleep 30") for line in cluster.left_running())
    slurm.requeue(job)
    cluster.wait(job, "PENDING", 20)
    slurm.exclude(job, ["n1", "n3"])
    waiting = slurm.show_job(job)
    assert waiting is not None
    assert (waiting.restarts, waiting.excluded) == (1, ("n1", "n3"))
    slurm.cancel(job)
    assert cluster.wait(job, "CANCELLED", 20)["JobState"] == "CANCELLED"
    assert slurm.show_job(job).has_ended  # type: ignore[union-attr]
    cluster.wait_for(lambda: not cluster.left_running(), 10, what="nothing is left")


def test_an_array_and_a_node_that_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "array.sh"
    script.write_text('#!/bin/bash\necho "$SLURM_ARRAY_TASK_ID $1" >> ' + f"{tmp_path}/said\n")
    job = slurm.submit(script, "--array=0-2", f"--output={tmp_path}/%a.out", arguments=["given"])
    cluster.wait_for(lambda: all(one.has_ended for one in slurm.show_array(job)), 20, what="the array has ended")
    assert sorted(one.job_id for one in slurm.show_array(job)) == [f"{job}_{number}" for number in range(3)]
    assert sorted((tmp_path / "said").read_text().splitlines()) == ["0 given", "1 given", "2 given"]
    before = slurm.node_states(cluster.nodes)
    assert [before[node].states for node in cluster.nodes] == [{"IDLE"}] * 3
    cluster.cut("n3")
    assert cluster.pids("n3") == {}
    cluster.wait_for(lambda: slurm.node_states(["n3"])["n3"].is_lost, 30, what="n3 is lost")
    cluster.repair()
    after = slurm.node_states(cluster.nodes)
    assert not after["n3"].is_lost
    started, again = before["n3"].slurmd_started, after["n3"].slurmd_started
    assert started is not None
    assert again is not None
    assert again > started
    assert after["n1"].slurmd_started == before["n1"].slurmd_started
    cluster.kill_slurmd("n1")
    cluster.repair()


def test_what_slurm_refuses_is_told_in_its_words(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    assert "on nodes n[1-2] in partition main" in slurm.submit(script, "--nodes=2", test_only=True)
    with pytest.raises(ConfigError, match=r"--nodes=9`: allocation failure: Requested node configuration is not avail"):
        slurm.submit(script, "--nodes=9", test_only=True)
    with pytest.raises(ConfigError, match="invalid partition specified: nowhere"):
        slurm.submit(script, "--partition=nowhere")
    assert slurm.show_job("4000000") is None
    with pytest.raises(ConfigError, match="Node n9 not found"):
        slurm.node_states(["n9"])
    assert slurm.hostnames("n[1-3]") == ["n1", "n2", "n3"]
    assert cluster.command("squeue", "--noheader") == ""
