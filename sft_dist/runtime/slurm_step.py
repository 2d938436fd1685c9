"""What SLURM says of a task of a step, that is, of a process that ``srun`` started; pure functions of the environment.

The batch shell is no task: SLURM runs it on the first node alone, whatever the job has, and numbers it like one.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sft_dist.errors import ConfigError

# Below the ports that Linux gives out by itself (32768 and above), above those of known services.
FIRST_PORT, NUM_PORTS = 20000, 10000

# Steps that are none: SLURM_BATCH_SCRIPT, SLURM_INTERACTIVE_STEP, SLURM_EXTERN_CONT, ... of slurm.h.
FIRST_SPECIAL_STEP = 0xFFFFFFF0

ARRAY, ELEMENT, JOB = "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"

RANGE = re.compile(r"(\d+)(?:-(\d+))?")
REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def own_job_id(env: Mapping[str, str] = os.environ) -> str | None:
    """The id of the job that this process runs in, ``12``, or ``12_3`` of an element of an array; None outside.

    One element's SLURM_JOB_ID is that of its whole array: ``scontrol requeue`` of it ends and requeues all elements.
    """
    if ELEMENT in env:
        return f"{env[ARRAY]}_{env[ELEMENT]}"
    return env.get(JOB)


@dataclass(frozen=True)
class Step:
    """A step of a job, and the task in it that this process is.

    Args:
        job_id: of the job; the same after it was put back into the queue.
        step_id: 0, 1, ... within one start of the job.
        hosts: the nodes by name, in SLURM's order.
        node_rank: of this task's node among them.
        tasks_per_node: how many tasks each of them has.
        local_task: 0, 1, ... on this node.
        restart_count: how often the job was put back.
    """

    job_id: int
    step_id: int
    hosts: tuple[str, ...]
    node_rank: int
    tasks_per_node: tuple[int, ...]
    local_task: int
    restart_count: int

    @property
    def num_nodes(self) -> int:
        return len(self.hosts)

    @property
    def first_host(self) -> str:
        return self.hosts[0]

    @property
    def num_tasks_here(self) -> int:
        return self.tasks_per_node[self.node_rank]

    @property
    def is_first(self) -> bool:
        """Whether this task speaks for the step."""
        return self.node_rank == 0 and self.local_task == 0

    @property
    def run_id(self) -> str:
        """The same in all tasks of the step, in no other step of the cluster."""
        return f"{self.job_id}.{self.step_id}.{self.restart_count}"

    @property
    def port(self) -> int:
        """The same in all tasks; neighbouring jobs and the steps of one job have different ones."""
        return FIRST_PORT + (self.job_id * 37 + self.step_id) % NUM_PORTS


def step_from_environment(env: Mapping[str, str] = os.environ) -> Step | None:
    """The step that this process is a task of; None outside SLURM and in the batch shell of a job.

    Raises:
        ConfigError: the variables are incomplete or contradict each other.
    """
    if not _is_in_a_step(env):
        return None
    try:
        hosts = tuple(expand_hosts(env["SLURM_STEP_NODELIST"]))
        step = Step(
            job_id=int(env["SLURM_JOB_ID"]),
            step_id=int(env["SLURM_STEP_ID"]),
            hosts=hosts,
            node_rank=int(env["SLURM_NODEID"]),
            tasks_per_node=expand_counts(env["SLURM_STEP_TASKS_PER_NODE"]),
            local_task=int(env["SLURM_LOCALID"]),
            restart_count=int(env.get("SLURM_RESTART_COUNT", "0")),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the environment of the SLURM step is incomplete or not understood: {error.args[0]}",
            fix="start it with srun, and hand SLURM_* on to it unchanged",
        ) from None
    if not (0 <= step.node_rank < len(hosts) == len(step.tasks_per_node) and step.local_task < step.num_tasks_here):
        raise ConfigError(
            f"the environment of the SLURM step contradicts itself: {step}",
            fix="start it with srun, and hand SLURM_* on to it unchanged",
        )
    return step


def _is_in_a_step(env: Mapping[str, str]) -> bool:
    """A batch shell may have inherited variables of the step that ``sbatch`` was called in: of other nodes, mostly."""
    if "SLURM_JOB_ID" not in env or "SLURM_STEP_ID" not in env or "SLURM_STEP_NODELIST" not in env:
        return False
    if int(env["SLURM_STEP_ID"]) >= FIRST_SPECIAL_STEP:
        return False
    if env.get("SLURM_NNODES") != env.get("SLURM_STEP_NUM_NODES"):
        return False
    own = env.get("SLURMD_NODENAME")
    return own is None or own in expand_hosts(env["SLURM_STEP_NODELIST"])


def nodes_of_the_job(env: Mapping[str, str] = os.environ) -> int:
    """Nodes of the job that this process runs in; 1 outside SLURM."""
    return int(env.get("SLURM_JOB_NUM_NODES", "1"))


def expand_hosts(nodelist: str) -> list[str]:
    """``n[1-2,07]x,gpu-a`` as SLURM abbreviates it -> ``[n1x, n2x, n07x, gpu-a]``, as `scontrol show hostnames`.

    Raises:
        ValueError: it has no such form.
    """
    return [host for word in _split_outside_brackets(nodelist) for host in _expanded(word)]


def _split_outside_brackets(nodelist: str) -> Iterator[str]:
    depth, start = 0, 0
    for position, character in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise ValueError(f"node list {nodelist!r}")
        if character == "," and depth == 0:
            yield nodelist[start:position]
            start = position + 1
    if depth:
        raise ValueError(f"node list {nodelist!r}")
    yield nodelist[start:]


def _expanded(word: str) -> Iterator[str]:
    """Of one name with any number of brackets; the last one counts fastest."""
    if not word:
        raise ValueError("node list with an empty name")
    parts = re.split(r"\[([^]]*)\]", word)
    numbers = [[*_numbers(part)] for part in parts[1::2]]
    for chosen in itertools.product(*numbers):
        pieces = [*itertools.chain.from_iterable(zip(parts[::2], chosen, strict=False)), parts[-1]]
        yield "".join(pieces)


def _numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        found = RANGE.fullmatch(part)
        if found is None:
            raise ValueError(f"node list with [{ranges}]")
        first, last = found[1], found[2] or found[1]
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}d}"


def expand_counts(counts: str) -> tuple[int, ...]:
    """``2(x3),1`` -> ``(2, 2, 2, 1)``.

    Raises:
        ValueError: it has no such form.
    """
    expanded: list[int] = []
    for part in counts.split(","):
        found = REPEATED.fullmatch(part)
        if found is None:
            raise ValueError(f"tasks per node {counts!r}")
        expanded += [int(found[1])] * int(found[2] or 1)
    return tuple(expanded)
