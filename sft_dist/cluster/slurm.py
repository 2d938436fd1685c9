"""SLURM's commands, with types: what is asked of it and what it answers. Needs Python's standard library only."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sft_dist.errors import ConfigError, MachineError

# The commands wait for minutes for a controller that does not answer.
TIMEOUT_S = 30.0

NO_SUCH_JOB = "Invalid job id specified"
# What the commands say where they have not reached the controller.
NO_ANSWER = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Transport endpoint")
# Where SLURM's programs find no slurm.conf, in no file and from no controller.
NO_CONFIGURATION = "Could not establish a configuration source"

# States that a job does not leave any more by itself.
ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    }
)  # fmt: skip

_KEY = re.compile(r"(?:^|\s)([A-Z][A-Za-z0-9/:]*)=")


@dataclass(frozen=True)
class JobState:
    """What the controller knows of a job, or of one job of an array."""

    job_id: str
    name: str
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING, CANCELLED, ..."""
    reason: str
    """why it waits or ended; "None" is SLURM's own word"""
    nodes: tuple[str, ...]
    """host names of the nodes it has, or had last; empty while it waits for its first"""
    excluded: tuple[str, ...]
    """host names of nodes that it must not get"""
    restarts: int
    may_requeue: bool
    is_preempted: bool
    """another job gets its nodes; it runs on for the grace time of its partition"""
    submitted: datetime | None
    started: datetime | None
    """of the last start; for a waiting job, where SLURM has planned one"""
    ended: datetime | None
    """for a running job, when its time limit ends it"""
    time_limit_s: int | None
    """None: unlimited"""
    exit_code: int
    ended_by_signal: int
    """0 where none did"""
    dependency: str
    """as sbatch takes it; empty where there is none"""
    partition: str
    output: Path | None
    """file that the job's output goes to"""
    run_directory: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class NodeState:
    """What the controller knows of a node."""

    name: str
    states: frozenset[str]
    """e.g. {"IDLE"}, {"ALLOCATED", "NOT_RESPONDING"}, {"DOWN", "DRAIN"}"""
    slurmd_started: datetime | None
    booted: datetime | None
    reason: str
    """why it is down or drained; empty else"""

    @property
    def is_lost(self) -> bool:
        """Whether no job can run there now."""
        return bool(self.states & {"DOWN", "FAIL", "NOT_RESPONDING"})


def show_job(job_id: str) -> JobState | None:
    """What the controller knows of a job; the first of an array; None: it has forgotten it, or never knew it.

    Raises:
        ConfigError: SLURM is not installed here, or refuses to answer.
        MachineError: its controller does not answer.
    """
    jobs = show_array(job_id)
    return jobs[0] if jobs else None


def show_array(job_id: str) -> list[JobState]:
    """All jobs of an array, or the one job; raises as ``show_job``."""
    answer = _run("scontrol", "--oneliner", "show", "job", job_id, accepted=NO_SUCH_JOB)
    return [_job(parse_record(line)) for line in answer.splitlines() if line.startswith("JobId=")]


def submit(script: str | Path, *options: str, arguments: Sequence[str] = (), test_only: bool = False) -> str:
    """Gives SLURM a job.

    Args:
        script: file of the batch script.
        options: of sbatch, before those in the script.
        arguments: of the script.
        test_only: only ask whether it could run.

    Returns:
        The job's id; with ``test_only`` what SLURM says of when and where it would run.

    Raises:
        ConfigError: SLURM is not installed here, or refuses the job.
        MachineError: its controller does not answer.
    """
    command = ["sbatch", *(["--test-only"] if test_only else ["--parsable"]), *options, str(script), *arguments]
    answer = _run(*command)
    return answer.strip() if test_only else answer.strip().splitlines()[-1].partition(";")[0]


def requeue(job_id: str) -> None:
    """Puts a job back into the queue; from inside it, it is ended for that. Raises as ``show_job``."""
    _run("scontrol", "requeue", job_id)


def cancel(*job_ids: str) -> None:
    """Ends jobs, also those that wait. Raises as ``show_job``."""
    _run("scancel", *job_ids)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Says which nodes a waiting job must not get, in place of those said before. Raises as ``show_job``."""
    _run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def node_states(nodes: Sequence[str]) -> dict[str, NodeState]:
    """What the controller knows of nodes, by name. Raises as ``show_job``; ConfigError for an unknown node too."""
    if not nodes:
        return {}
    answer = _run("scontrol", "--oneliner", "show", "node", ",".join(nodes))
    found = [_node(parse_record(line)) for line in answer.splitlines() if line.startswith("NodeName=")]
    return {node.name: node for node in found}


def hostnames(nodelist: str) -> list[str]:
    """``gpu[01-03,07]`` as its single names. Raises as ``show_job``."""
    return _run("scontrol", "show", "hostnames", nodelist).split()


def parse_record(line: str) -> dict[str, str]:
    """One line of ``scontrol --oneliner show``: values by name. A value may hold spaces; the first of a name counts."""
    keys = list(_KEY.finditer(line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    record: dict[str, str] = {}
    for key, end in zip(keys, ends, strict=True):
        record.setdefault(key[1], line[key.end() : end].strip())
    return record


def seconds(limit: str) -> int | None:
    """A time limit as SLURM prints it, D-HH:MM:SS or HH:MM:SS; None for one that is not limited."""
    if not re.fullmatch(r"(\d+-)?\d+:\d+:\d+", limit):
        return None
    days, _, clock = limit.rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _job(record: dict[str, str]) -> JobState:
    code, _, number = record["ExitCode"].partition(":")
    identity = record["JobId"]
    if "ArrayTaskId" in record:
        identity = f"{record['ArrayJobId']}_{record['ArrayTaskId']}"
    dependency = record.get("Dependency", "")
    return JobState(
        job_id=identity,
        name=record["JobName"],
        state=record["JobState"],
        reason=record["Reason"],
        nodes=_names(record.get("NodeList", "")),
        excluded=_names(record.get("ExcNodeList", "")),
        restarts=int(record["Restarts"]),
        may_requeue=record["Requeue"] == "1",
        is_preempted=_time(record.get("PreemptTime", "None")) is not None,
        submitted=_time(record["SubmitTime"]),
        started=_time(record["StartTime"]),
        ended=_time(record["EndTime"]),
        time_limit_s=seconds(record["TimeLimit"]),
        exit_code=int(code),
        ended_by_signal=int(number),
        dependency="" if dependency == "(null)" else dependency,
        partition=record["Partition"],
        output=Path(record["StdOut"]) if "StdOut" in record else None,
        run_directory=record.get("WorkDir", ""),
    )


def _node(record: dict[str, str]) -> NodeState:
    # A mark behind the state says that something is pending, such as ~ for "powered down" or * for "not responding".
    words = record["State"].split("+")
    states = {word.rstrip("*~#!%$@^-") for word in words}
    if any(word.endswith("*") for word in words):
        states.add("NOT_RESPONDING")
    return NodeState(
        name=record["NodeName"],
        states=frozenset(states),
        slurmd_started=_time(record.get("SlurmdStartTime", "None")),
        booted=_time(record.get("BootTime", "None")),
        reason=record.get("Reason", ""),
    )


def _names(nodelist: str) -> tuple[str, ...]:
    """Most jobs name one node or none, which takes no further command to understand."""
    if nodelist in ("", "(null)", "None"):
        return ()
    if re.fullmatch(r"[\w.-]+(,[\w.-]+)*", nodelist):
        return tuple(nodelist.split(","))
    return tuple(hostnames(nodelist))


def _time(text: str) -> datetime | None:
    """Local time, as the controller prints it."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None  # "Unknown", "N/A", "None"


def _run(*command: str, accepted: str | None = None) -> str:
    """What a command of SLURM prints, on stdout and stderr.

    Args:
        accepted: a refusal with these words is an empty answer.
    """
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ConfigError(
            f"SLURM is not installed here: there is no program {command[0]}",
            fix="run this on a node of the cluster, such as its login node, or load the module that brings SLURM",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"`{command[0]}` got no answer in {TIMEOUT_S:.0f} s", fix=_ASK) from error
    if done.returncode == 0:
        return done.stdout
    if accepted is not None and accepted in done.stdout:
        return ""
    said = "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip()) or "(nothing)"
    if NO_CONFIGURATION in said:
        raise ConfigError(
            f"this machine is not attached to a cluster: SLURM is installed here and has no configuration ({said})",
            fix="run this on a node of the cluster, such as its login node, or set SLURM_CONF to its slurm.conf",
        )
    if any(words in said for words in NO_ANSWER):
        raise MachineError(f"SLURM's controller does not answer: {said}", fix=_ASK)
    raise ConfigError(
        f"SLURM refused `{' '.join(command[:3])}`: {said}",
        fix="change what it names; `sinfo` lists partitions and nodes, `scontrol show job ID` tells of a job",
    )


_ASK = "see `scontrol ping`; try again when the controller answers"
