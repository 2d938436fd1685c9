"""Two nodes x two processes train through sbatch, whatever starts them, and learn what one process learns alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sft_dist.cluster import slurm
from sft_dist.runtime import exit_notes
from sft_dist.runtime.slurm_step import expand_hosts
from tests.helpers import figures
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY, STEPS, SmallRun

pytestmark = pytest.mark.slurm

SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --exclude=n3 --time=10
cd {repository} || exit 1
export SFT_DIST_JOB_NOTES={notes} SFT_DIST_MEETING_S=200
{commands}
"""
HEADING = re.compile(r"--- .* UTC: rank (\d) of 4, local rank (\d) on (\S+), process \d+, network (\S+)")


def metrics(output: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([[line["loss"], line["grad_norm"]] for line in lines])


@pytest.fixture(scope="module")
def alone(small_run: SmallRun) -> np.ndarray:
    """[steps, 2]: losses and norms of one process on one machine."""
    file, output = small_run.write("launched-alone")
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "train", str(file)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return metrics(output)


@pytest.mark.parametrize(
    ("name", "tasks_per_node", "options", "strategy"),
    [
        ("torchrun", 1, "--nproc-per-node 2", "fsdp2"),
        ("accelerate", 1, "--num_processes 4", "zero2"),
        ("deepspeed", 1, "--num_gpus 2", "zero3"),
        ("srun", 2, "", "ddp"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_two_nodes_of_two_processes(
    cluster: Cluster, small_run: SmallRun, alone: np.ndarray, tmp_path: Path,
    name: str, tasks_per_node: int, options: str, strategy: str,
) -> None:  # fmt: skip
    file, output = small_run.write(f"launched-{name}")
    command = f"srun --ntasks-per-node={tasks_per_node} --wait=40 launch/{name}.sh {options} train {file}"
    screen, notes = tmp_path / "screen", tmp_path / "notes"
    job = cluster.submit(
        SCRIPT.format(repository=REPOSITORY, notes=notes, commands=f'{command} "sharding={{strategy: {strategy}}}"'),
        f"--ntasks-per-node={tasks_per_node}", f"--output={screen}",
    )  # fmt: skip
    cluster.wait(job, "COMPLETED", 300)
    trained = metrics(output)
    figures.difference("launchers on a cluster against one process", trained, alone)
    np.testing.assert_allclose(trained, alone, rtol=1e-5)

    # Each rank where SLURM's order of the nodes puts it, on the interface that leads to the other node.
    logs = {int(log.stem.partition("-")[2]): log.read_text() for log in (output / f"logs/{job}-0").iterdir()}
    headings = {rank: HEADING.match(text) for rank, text in logs.items()}
    assert {rank: found and found.groups() for rank, found in headings.items()} == {
        rank: (str(rank), str(rank % 2), f"n{1 + rank // 2}", "eth0") for rank in range(4)
    }
    # Rank 0 is on the screen and in its log, the others print nothing.
    said = screen.read_text()
    assert said.count(f"logs      {output}/logs/{job}-0/rank-0.log to rank-3.log\n") == 1
    assert said.count("2 nodes, n1 to n2: meeting at n1:") == 1
    assert "over eth0\n" in said
    assert f"{strategy} on 4 ranks, verified" in said
    for line in ("verified: rank 0 holds", f"step {STEPS}/{STEPS}  loss "):
        assert (said.count(line), logs[0].count(line)) == (1, 1)
    assert "[c10d]" not in said
    assert "warning" not in said.lower()

    tasks = 1 if tasks_per_node == 1 else 2
    assert exit_notes.read(notes) == {0: [0] * tasks, 1: [0] * tasks}
    assert exit_notes.hosts(notes) == {0: "n1", 1: "n2"}
    assert cluster.left_running() == []


@pytest.mark.full
def test_signals_reach_the_tasks_of_plain_srun(cluster: Cluster, small_run: SmallRun, tmp_path: Path) -> None:
    """As SLURM sends them before the time limit and at a preemption: to every process of the step."""
    file, output = small_run.write("launched-and-stopped", train={"max_steps": 4000})
    screen, notes = tmp_path / "screen", tmp_path / "notes"
    job = cluster.submit(
        SCRIPT.format(
            repository=REPOSITORY, notes=notes, commands=f"srun --wait=40 launch/srun.sh train {file}; exit $?"
        ),
        "--ntasks-per-node=2", f"--output={screen}",
    )  # fmt: skip
    steps = output / "metrics.jsonl"
    cluster.wait_for(lambda: steps.exists() and len(steps.read_text().splitlines()) > 3, 200, what="steps", job=job)
    cluster.command("scancel", "--signal=TERM", f"{job}.0")
    assert cluster.wait(job, "FAILED", 60)["ExitCode"] == "75:0"
    assert exit_notes.read(notes) == {0: [75, 75], 1: [75, 75]}
    (saved,) = (output / "checkpoints").glob("step-*")
    for text in (screen.read_text(), (output / f"logs/{job}-0/rank-0.log").read_text()):
        assert text.count(f": saved {saved}") == 1
        assert "Traceback" not in text
    assert cluster.left_running() == []


MISTAKES = """\
train="train {file} output_dir={output}"
launch/srun.sh $train; echo "outside a step: $?"
srun --ntasks=3 launch/srun.sh $train; echo "uneven: $?"
MASTER_ADDR=nowhere.invalid srun --ntasks-per-node=2 launch/srun.sh $train; echo "unknown host: $?"
srun --ntasks-per-node=2 launch/srun.sh $train train.max_steps=-1; echo "configuration: $?"
python3 -c "import socket, time; s = socket.socket(); s.bind(('', 20007)); s.listen(); time.sleep(60)" & holder=$!
sleep 0.5
MASTER_PORT=20007 srun --nodes=1 --ntasks=1 launch/srun.sh $train; echo "busy port: $?"
kill $holder
launch/torchrun.sh $train; echo "batch shell: $?"
"""


def test_mistakes_are_told_in_seconds(cluster: Cluster, small_run: SmallRun, tmp_path: Path) -> None:
    file, output = small_run.write("launched-wrongly")
    screen = tmp_path / "screen"
    commands = MISTAKES.format(file=file, output=output)
    job = cluster.submit(
        SCRIPT.format(repository=REPOSITORY, notes=tmp_path / "notes", commands=commands),
        "--ntasks-per-node=2", f"--output={screen}",
    )  # fmt: skip
    cluster.wait(job, "COMPLETED", 120)
    said = screen.read_text()
    expected = {
        "outside a step: 2": "launch/srun.sh was not started by srun",
        "uneven: 2": "launch/srun.sh: the nodes have different numbers of tasks (n1: 2, n2: 1)",
        "unknown host: 7": "launch/srun.sh: n1 finds no way to the node nowhere.invalid: ",
        "configuration: 2": "train.max_steps",
        "busy port: 7": "launch/srun.sh: port 20007 of n1 is in use",
        "batch shell: 2": "launch/torchrun.sh was started on one node alone, and the job has 2",
    }
    before = 0
    for code, problem in expected.items():
        assert f"\n{code}\n" in f"\n{said}", said
        after = said.index(code)
        part = said[before:after]
        assert f"error: {problem}" in part or (problem in part and "error: " in part), said
        assert "Traceback" not in part, said
        before = after
    assert not (output / "checkpoints").exists()


def test_node_lists_are_expanded_as_slurm_does(cluster: Cluster) -> None:
    for nodelist in ("n[1-3]", "a[1-3,07-10],b", "gpu-a-[1-2],r[1-2]n[09-11]"):
        assert expand_hosts(nodelist) == slurm.hostnames(nodelist)
