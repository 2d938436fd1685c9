"""What a task of a SLURM step knows of itself, from variables as SLURM 22.05 sets them."""

from __future__ import annotations

import pytest

from sft_dist.errors import ConfigError
from sft_dist.runtime.slurm_step import FIRST_PORT, NUM_PORTS, Step, expand_counts, expand_hosts, step_from_environment

BATCH_SHELL = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURMD_NODENAME": "gpu-a-09",
}
TASK = BATCH_SHELL | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu-a-[09-10]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "gpu-a-10",
}


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07-10]", ["n1", "n2", "n3", "n07", "n08", "n09", "n10"]),
        ("gpu-a-[1-2]x,login", ["gpu-a-1x", "gpu-a-2x", "login"]),
        ("a,b[1,3],c", ["a", "b1", "b3", "c"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
    ],
)
def test_node_lists(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "n[1-2", "n1]", "n[[1]]", "n[a-b]", "n[]", "a,,b"])
def test_what_is_no_node_list(nodelist: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        expand_hosts(nodelist)


def test_counts() -> None:
    assert expand_counts("8") == (8,)
    assert expand_counts("2(x3),1") == (2, 2, 2, 1)
    with pytest.raises(ValueError, match="tasks per node"):
        expand_counts("2(3)")


def test_a_task() -> None:
    step = step_from_environment(TASK)
    assert step == Step(17, 1, ("gpu-a-09", "gpu-a-10"), 1, (2, 2), 1, 0)
    assert (step.num_nodes, step.first_host, step.num_tasks_here, step.is_first) == (2, "gpu-a-09", 2, False)
    assert step.run_id == "17.1.0"
    again = step_from_environment(TASK | {"SLURM_RESTART_COUNT": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert again is not None
    assert (again.run_id, again.is_first, again.port) == ("17.1.2", True, step.port)


def test_ports_of_neighbours_differ() -> None:
    steps = [Step(job, step, ("n1",), 0, (1,), 0, 0) for job in range(50_000, 50_200) for step in range(5)]
    ports = {step.port for step in steps}
    assert len(ports) == len(steps)
    assert FIRST_PORT <= min(ports) <= max(ports) < FIRST_PORT + NUM_PORTS


@pytest.mark.parametrize(
    "env",
    [
        {},
        BATCH_SHELL,
        # salloc's own shell, and a batch shell whose sbatch was called in a step of other nodes.
        TASK | {"SLURM_STEP_ID": "4294967290"},
        TASK | {"SLURM_STEP_NODELIST": "login", "SLURM_STEP_NUM_NODES": "1"},
        TASK | {"SLURMD_NODENAME": "other"},
    ],
    ids=["outside", "batch", "interactive", "inherited", "inherited too"],
)
def test_no_task(env: dict[str, str]) -> None:
    assert step_from_environment(env) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "tasks per node 'two'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, "contradicts itself"),
        ({"SLURM_LOCALID": "2"}, "contradicts itself"),
        ({"SLURM_NODEID": "2"}, "contradicts itself"),
    ],
)
def test_what_cannot_be(change: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        step_from_environment(TASK | change)
    incomplete = {key: value for key, value in TASK.items() if key != "SLURM_LOCALID"}
    with pytest.raises(ConfigError, match="SLURM_LOCALID"):
        step_from_environment(incomplete)
