"""What follows an attempt of the training job: it is done, is started again, gives up, or somebody else has decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.cluster.attempts import DONE, GIVE_UP, LEAVE, REQUEUE, Attempt
from sft_dist.errors import MachineError, Preempted, Stalled

# Of an attempt that ended in order: the same would happen again, or the user wanted the end.
FINAL = {
    2: "usage or configuration",
    3: "does not fit the devices",
    4: "data",
    5: "model or checkpoint",
    6: "training diverged",
    130: "interrupted",
}
RUNNING = "RUNNING"
PREEMPTED = "preempted: its nodes are wanted by another job"


@dataclass(frozen=True)
class Decision:
    """What happens to the job now, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class JobNow:
    """What SLURM says of the job when its steps have ended.

    Args:
        restarts: that SLURM has counted; more than the attempt's own: SLURM has requeued it.
        is_preempted: another job gets its nodes.
    """

    state: str
    restarts: int
    may_requeue: bool
    is_preempted: bool


def decide(code: int, job: JobNow, *, restart: int, fruitless: int, max_restarts: int) -> Decision:
    """What is to be done after an attempt.

    Args:
        code: of the attempt.
        restart: number of the attempt, from 0.
        fruitless: attempts in a row, this one included, that got no further than the last checkpoint before them.
        max_restarts: so many times it is started again for that.
    """
    if job.state != RUNNING and job.restarts > restart:
        return Decision(LEAVE, "SLURM has put the job back into the queue itself")
    if code == 0:
        return Decision(DONE, "the run is done")
    if job.state != RUNNING:
        return Decision(LEAVE, f"the job is {job.state.lower()}: cancelled, or at its time limit")
    if code in FINAL:
        return Decision(GIVE_UP, f"exit code {code} ({FINAL[code]}): another start would end the same way")
    if not job.may_requeue:
        return Decision(GIVE_UP, "the job was submitted with --no-requeue")
    if job.is_preempted:
        return Decision(REQUEUE, PREEMPTED)
    if fruitless > max_restarts:
        return Decision(GIVE_UP, no_progress(fruitless))
    return Decision(REQUEUE, _why_again(code))


def no_progress(fruitless: int) -> str:
    return f"{fruitless} starts in a row got no further than the last checkpoint"


def fruitless_in_a_row(attempts: Sequence[Attempt], *, now: int) -> int:
    """How many of a job's last attempts got no further than the checkpoint before them.

    Those that SLURM or a user ended count neither way.

    Args:
        attempts: of the job, the oldest first; the last may have no end yet.
        now: step of the newest checkpoint.
    """
    count = 0
    for attempt in reversed(attempts):
        after = now if attempt.step_after is None else attempt.step_after
        if after > attempt.step_before:
            break
        count += attempt.decision not in (LEAVE, DONE) and attempt.reason != PREEMPTED
    return count


def _why_again(code: int) -> str:
    if code == Preempted.exit_code:
        return "stopped by a signal"
    if code == MachineError.exit_code:
        return f"exit code {code}: a machine is not fit for training"
    if code == Stalled.exit_code:
        return f"exit code {code}: a rank made no progress"
    if code > 128:
        return f"a process was ended by signal {code - 128}"
    return f"exit code {code}: unexpected"
