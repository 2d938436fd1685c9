"""Which node a failed attempt is blamed on, and which nodes a job is to do without from now on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sft_dist.cluster.attempts import Attempt
from sft_dist.cluster.slurm import NodeState
from sft_dist.errors import MachineError, Stalled
from sft_dist.runtime import exit_notes
from sft_dist.runtime.exit_codes import PREEMPTED_EXIT_CODE, SIGTERM_EXIT_CODE, exit_code

# A node that failed once may have been unlucky.
BLAMED_ENOUGH = 2

DOCTOR = "doctor.json"
STALLS, VERDICT = "stalls", "verdict.json"

KILLED = -9

# How a launcher ends when its peers are gone: what happened elsewhere ended it.
CONSEQUENCES = frozenset({0, 1, MachineError.exit_code, Stalled.exit_code, PREEMPTED_EXIT_CODE, SIGTERM_EXIT_CODE, 143})


def codes_by_node(notes: Path, nodes: Sequence[str]) -> dict[str, int]:
    """How each node's launcher ended, by host name, as far as it noted; negative where a signal ended a process.

    One that began and did not come to note its end was itself ended by SIGKILL.

    Args:
        notes: folder of the attempt.
        nodes: of the job, in its order.
    """
    hosts = exit_notes.hosts(notes)
    found = {}
    for number, codes in exit_notes.read(notes).items():
        by_task = {task: KILLED if code is None else _signed(code) for task, code in enumerate(codes)}
        failed = {task: code for task, code in by_task.items() if code}
        name = hosts.get(number) or (nodes[number] if number < len(nodes) else str(number))
        found[_of_the_job(name, nodes)] = _signed(exit_code(failed)) if failed else 0
    return found


def code_of_all(by_node: Mapping[str, int], told: int) -> int:
    """The exit code of an attempt: the cause, not what it led to on other nodes.

    Args:
        by_node: as of ``codes_by_node``.
        told: by srun, which gives the highest of its tasks'; it stands for launchers that noted nothing.
    """
    failed = [code for code in by_node.values() if code]
    if any(code < 0 for code in failed):
        # Whose first node is gone has lost the network, as far as it can tell.
        failed = [code for code in failed if code != MachineError.exit_code]
    if told == 0:
        # Where a node is lost, srun may end with 0: it has heard of no task that failed.
        return exit_code(dict(enumerate(failed))) if failed else 0
    codes = dict(enumerate([*failed, _signed(told)] if told not in map(_unsigned, failed) else failed))
    return exit_code(codes)


def lost_nodes(states: Mapping[str, NodeState], *, since: float) -> dict[str, str]:
    """Nodes that went down after ``since`` (seconds since 1970), or came up again; with what happened."""
    lost = {}
    for name, state in states.items():
        started = state.slurmd_started
        if state.is_lost:
            lost[name] = "is " + "+".join(sorted(state.states))
        elif started is not None and started.timestamp() > since:
            lost[name] = "went down and came up again"
    return lost


def crashed_node(by_node: Mapping[str, int]) -> dict[str, str]:
    """The one node where a process was ended by a signal, while the others only lost their peers."""
    causes = {name: code for name, code in by_node.items() if code not in CONSEQUENCES}
    if len(causes) != 1 or len(by_node) < 2:
        return {}
    [(name, code)] = causes.items()
    return {name: f"lost a process to signal {-code}"} if code < 0 else {}


def failed_in_doctor(notes: Path) -> dict[str, str]:
    """Nodes that did not pass the checks before training."""
    try:
        document = json.loads((notes / DOCTOR).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there, or cut short
        return {}
    return dict.fromkeys(document["failed_nodes"], "did not pass the doctor")


def stalled_node(run: Path, attempt: Attempt, nodes: Sequence[str]) -> dict[str, str]:
    """The node whose rank the others waited for in vain in this attempt.

    Args:
        run: its folder has the verdict of each stall (``watchdog/verdict.py``).
    """
    for file in sorted(run.glob(f"{STALLS}/*/{VERDICT}"), reverse=True):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # gone, or cut short
            continue
        if (found["job_id"], found["restart"]) == (attempt.job, attempt.restart) and found["host"] is not None:
            return {_of_the_job(found["host"], nodes): f"made no progress: {found['what']}"}
    return {}


def blamed_enough(attempts: Iterable[Attempt]) -> list[str]:
    """Nodes that a job is to do without: blamed for several of its attempts."""
    counts = Counter(name for attempt in attempts for name in attempt.blamed)
    return sorted(name for name, count in counts.items() if count >= BLAMED_ENOUGH)


def _of_the_job(host: str, nodes: Sequence[str]) -> str:
    """SLURM's name of a node whose own may be longer, as node1.cluster.example is."""
    return next((name for name in nodes if host == name or host.split(".")[0] == name.split(".")[0]), host)


def _signed(code: int) -> int:
    return 128 - code if 128 < code < 160 else code


def _unsigned(code: int) -> int:
    return 128 - code if code < 0 else code
