"""One line about a run, from what its files and SLURM say of it. Pure: no file is read here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sft_dist.cluster.attempts import REQUEUE, Attempt
from sft_dist.cluster.evidence import Evidence, Pulse
from sft_dist.cluster.job_of_run import JobOfRun
from sft_dist.cluster.slurm import JobState
from sft_dist.metrics.heartbeat import Beat
from sft_dist.plan.money import format_usd
from sft_dist.plan.units import HOUR_S, duration, percent

# A heartbeat comes every 5 s; a network file system may show it to other machines a minute late.
SILENT_S = 120.0

# Without a step, in steps of the usual time, and at least.
STUCK_STEPS, STUCK_S = 10, 300.0

Kind = Literal["waiting", "starting", "working", "stuck", "silent", "stopped", "ended", "failed", "finished", "unknown"]

# Nothing of it is ahead, unless somebody starts it anew.
ENDED: frozenset[Kind] = frozenset(("ended", "failed", "finished"))

# Of exit codes, what they mean in a word (docs/launching.md).
CODES = {
    1: "unexpected", 2: "configuration", 3: "memory", 4: "data", 5: "checkpoint or model", 6: "diverged",
    7: "machine", 8: "stalled", 75: "stopped by a signal", 130: "interrupted", 137: "killed", 143: "ended by SIGTERM",
}  # fmt: skip

# Of SLURM's states, those that nothing follows, in words.
ENDINGS = {
    "BOOT_FAIL": "its nodes did not start",
    "CANCELLED": "cancelled",
    "DEADLINE": "ended by its deadline",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "killed for want of host memory",
    "PREEMPTED": "preempted for good",
    "REVOKED": "revoked",
    "TIMEOUT": "ended by its time limit",
}

NEVER = ("DependencyNeverSatisfied", "PartitionDown", "PartitionTimeLimit", "BadConstraints", "InvalidQOS")


@dataclass(frozen=True)
class Forecast:
    """What is still to come, by the speed that was measured.

    Args:
        left_s: of training, with the evaluations and saves in between.
        total_s, total_usd: of the whole run, all starts together; the latter None where no price is known.
    """

    left_s: float
    total_s: float
    total_usd: float | None


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        kind: for programs; stuck: beats and makes no step, stopped: by a signal, ended: by SLURM or by hand, unknown:
            the files do not tell.
        line: for people.
        is_trouble: whether somebody should look: it failed, will never start, or is silent or stuck.
    """

    kind: Kind
    line: str
    is_trouble: bool = False


def forecast(found: Evidence) -> Forecast | None:
    """None where the speed or the length of the run is not known."""
    step, step_s = step_of(found), _step_s(found)
    if step is None or found.num_steps is None or step_s is None or found.bill is None:
        return None
    left_s = max(0, found.num_steps - step) * step_s
    bill = found.bill
    usd = None
    if bill.spent_usd is not None and bill.usd_per_hour is not None:
        usd = bill.spent_usd + left_s * bill.usd_per_hour / HOUR_S
    return Forecast(left_s, bill.elapsed_s + left_s, usd)


def step_of(found: Evidence) -> int | None:
    """Completed steps. ``metrics.jsonl`` is ahead of the heartbeat by seconds, but behind a checkpoint it is cut."""
    beat = None if found.pulse is None else found.pulse.beat
    last = None if found.measured is None else found.measured.step
    if beat is None or beat.step is None:
        return last
    before_training = beat.phase in ("preparing", "loading", "rehearsing")
    return beat.step if last is None or before_training else max(beat.step, last)


def _step_s(found: Evidence) -> float | None:
    """Wall time from step to step; a single step says little more than nothing, but it is all there may be."""
    if found.pulse is not None and found.pulse.beat.step_s is not None:
        return found.pulse.beat.step_s
    return None if found.measured is None else found.measured.step_time_s


def judge(
    found: Evidence, job: JobOfRun | None, *, now: float, is_gone: bool | None, silent_s: float = SILENT_S
) -> Verdict:
    """
    Args:
        now: seconds since 1970.
        is_gone: whether the process that beats is known to be no more; None: it is on another machine.
        silent_s: how long no heartbeat may come from a run that should be there.
    """
    pulse = found.pulse
    if found.finished and not _lives(pulse, silent_s, is_gone):
        return Verdict("finished", _finished(found))
    if job is not None:
        said = _by_the_job(found, job, now)
        if said is not None:
            return said
    if pulse is None:
        return _without_heartbeat(found, job)
    runs = job is not None and job.state is not None
    return _by_heartbeat(found, pulse, is_gone=is_gone, silent_s=silent_s, runs=runs)


def _by_the_job(found: Evidence, job: JobOfRun, now: float) -> Verdict | None:
    """None: the job runs, or SLURM does not tell, and the heartbeat says more."""
    state = job.state
    if state is not None and state.state == "PENDING":
        return _pending(found, job, state, now)
    if job.has_given_up and (state is None or state.has_ended):
        return _gave_up(found, job)
    if state is None:
        return _by_the_attempts(found, job)
    if state.has_ended:
        return _after_the_job(found, job, state)
    if found.pulse is None or not _is_of(found.pulse.beat, job, state):
        return _starting(state)
    return None


def _gave_up(found: Evidence, job: JobOfRun) -> Verdict:
    last = job.last
    assert last is not None
    beat = None if found.pulse is None else found.pulse.beat
    if beat is not None and beat.phase == "failed" and _is_of_start(beat, last) and beat.exit_code == last.code:
        return _failed(last.code or 1, at(found, beat), beat.what)
    return Verdict("failed", f"gave up{at(found)}: {last.reason}", is_trouble=True)


def _by_the_attempts(found: Evidence, job: JobOfRun) -> Verdict | None:
    """Where SLURM does not tell: what the job itself noted last, if no later start has shown itself."""
    last, beat = job.last, None if found.pulse is None else found.pulse.beat
    if last is None or last.decision != REQUEUE or (beat is not None and beat.restart > last.restart):
        return None
    return Verdict("waiting", f"asked for another start{at(found)}, nothing has come of it yet: {last.reason}")


def _is_of_start(beat: Beat, start: Attempt) -> bool:
    return (beat.job_id, beat.restart) == (start.job, start.restart)


def _lives(pulse: Pulse | None, silent_s: float, is_gone: bool | None) -> bool:
    return (
        pulse is not None
        and pulse.beat.phase not in ("done", "stopped", "failed")
        and pulse.age_s < silent_s
        and not is_gone
    )


def _by_heartbeat(found: Evidence, pulse: Pulse, *, is_gone: bool | None, silent_s: float, runs: bool) -> Verdict:
    beat = pulse.beat
    if beat.phase == "failed":
        return _failed(beat.exit_code or 1, at(found, beat), beat.what)
    if beat.phase == "stopped":
        return Verdict("stopped", f"{beat.what or 'stopped'}; it goes on with --resume auto")
    if beat.phase == "done":
        # final/ is missing or the receipt could not be written: somebody has moved files, or the disk was full.
        return Verdict("unknown", "the run has ended in order, but its final/ or its receipt is not here")
    if is_gone:
        line = f"its process is gone{at(found, beat)}: killed, {duration(pulse.age_s)} ago at most"
        return Verdict("silent", f"{line}; it goes on with --resume auto", is_trouble=True)
    if pulse.age_s >= silent_s:
        line = (
            f"no sign of life for {duration(pulse.age_s)}: the last heartbeat is from node {beat.host} at "
            f"{clock_time(pulse.dated, pulse.dated + pulse.age_s)},{at(found, beat) or ' before the first step'}"
        )
        return Verdict("silent", line + ("" if runs else "; it was killed or its machine is lost"), is_trouble=True)
    return _working(found, pulse, silent_s)


def _working(found: Evidence, pulse: Pulse, silent_s: float) -> Verdict:
    beat = pulse.beat
    limit_s = max(STUCK_STEPS * (beat.step_s or 0.0), STUCK_S, silent_s)
    if pulse.step_age_s is not None and pulse.step_age_s >= limit_s:
        line = f"hangs? It lives, but has made no step for {duration(pulse.step_age_s)}{at(found)}, on {beat.host}"
        return Verdict("stuck", line, is_trouble=True)
    parts = []
    if beat.phase == "training":
        parts.append(f"training{_progress(found)}")
    elif beat.phase in ("evaluating", "saving"):
        parts.append(f"{beat.phase} for {duration(pulse.phase_age_s)}{_progress(found)}")
    else:
        words = {
            "preparing": "preparing the data",
            "loading": "loading the model",
            "exporting": "writing final/",
            "proving": "proving final/",
        }
        parts.append(f"{words.get(beat.phase, beat.phase)} for {duration(pulse.phase_age_s)}")
    ahead = forecast(found)
    if ahead is not None and beat.phase in ("training", "evaluating", "saving"):
        parts.append(f"about {duration(ahead.left_s)} left")
        if found.bill is not None and found.bill.spent_usd is not None and ahead.total_usd is not None:
            parts.append(f"{format_usd(found.bill.spent_usd)} of {format_usd(ahead.total_usd)}")
    return Verdict("working", ", ".join(parts))


def _progress(found: Evidence) -> str:
    step = step_of(found)
    if step is None:
        return ""
    if not found.num_steps:
        return f", step {step:,}"
    return f", step {step:,} of {found.num_steps:,} ({percent(step / found.num_steps)})"


def at(found: Evidence, beat: Beat | None = None) -> str:
    """`` at step 120 of 900``, and in which phase where that was another one than training; empty before the first."""
    step = step_of(found)
    phase = None if beat is None else beat.during or beat.phase
    doing = f" while {phase}" if phase is not None and phase not in ("training", "done", "stopped", "failed") else ""
    if step is None:
        return doing
    return f"{doing} at step {step:,}" + (f" of {found.num_steps:,}" if found.num_steps else "")


def _finished(found: Evidence) -> str:
    said = "finished" + (f" after {found.num_steps:,} steps" if found.num_steps else "")
    if found.stopped_at is not None:
        planned = f" of {found.num_steps:,}" if found.num_steps else ""
        said = f"finished: stopped early at step {found.stopped_at:,}{planned}"
    said += {"proven": ", final/ is proven", "not proven": ", final/ is there, not proven"}.get(found.final or "", "")
    if found.bill is not None and found.bill.spent_usd is not None:
        said += f", {format_usd(found.bill.spent_usd)}"
    return said


def _pending(found: Evidence, job: JobOfRun, state: JobState, now: float) -> Verdict:
    why = "" if state.reason in ("None", "") else f" ({state.reason})"
    if state.reason in NEVER:
        return Verdict("waiting", f"will not start{why}: see `scontrol show job {state.job_id}`", is_trouble=True)
    if state.reason.startswith("JobHeld"):
        line = f"held in the queue{why}: `scontrol release {state.job_id}` lets it go"
        return Verdict("waiting", line, is_trouble=state.reason == "JobHeldAdmin")
    expected = "" if state.started is None else f", expected to start at {clock_time(state.started.timestamp(), now)}"
    if state.restarts == 0:
        line = "waiting for the job before it" if state.reason == "Dependency" else "waiting in the queue"
        return Verdict("waiting", f"{line}{why}{expected}")
    if job.last is not None and job.last.decision == REQUEUE and not (job.last.reason or "").startswith("preempted"):
        return Verdict("waiting", f"waiting to start again{why}{expected}{at(found)}: {job.last.reason}")
    ended = "preempted" if job.last is not None and job.last.decision == REQUEUE else "interrupted"
    return Verdict("waiting", f"{ended}{at(found)}, waiting to start again{why}{expected}")


def _starting(state: JobState) -> Verdict:
    if state.state == "COMPLETING":
        return Verdict("starting", f"job {state.job_id} is ending its processes")
    on = ", ".join(state.nodes[:3]) + (f" and {len(state.nodes) - 3} more" if len(state.nodes) > 3 else "")
    line = f"starting on {on}: the job has its nodes, training has not begun"
    return Verdict("starting", line)


def _is_of(beat: Beat, job: JobOfRun, state: JobState) -> bool:
    """Whether a heartbeat is of the last start of a job."""
    return beat.job_id == job.job_id and beat.restart == state.restarts


def _after_the_job(found: Evidence, job: JobOfRun, state: JobState) -> Verdict:
    beat = None if found.pulse is None else found.pulse.beat
    if beat is not None and _is_of(beat, job, state) and beat.phase == "failed":
        return _failed(beat.exit_code or 1, at(found, beat), beat.what)
    if state.state in ENDINGS:
        line = f"{ENDINGS[state.state]}{at(found)}: job {state.job_id} does not start again by itself"
        return Verdict("ended", line, is_trouble=state.state != "CANCELLED")
    if state.exit_code or state.ended_by_signal:
        return _failed(state.exit_code or 128 + state.ended_by_signal, at(found), None)
    return Verdict("ended", f"job {state.job_id} ended{at(found)}, and the run is not finished", is_trouble=True)


def _failed(code: int, where: str, what: str | None) -> Verdict:
    meaning = f" ({CODES[code]})" if code in CODES else ""
    return Verdict("failed", f"failed with {code}{meaning}{where}" + (f": {what}" if what else ""), is_trouble=True)


def _without_heartbeat(found: Evidence, job: JobOfRun | None) -> Verdict:
    if found.measured is not None:
        line = f"not finished{at(found)}: the last line of metrics is {duration(found.measured.age_s)} old"
        return Verdict("unknown", line)
    if job is not None:
        return Verdict("unknown", f"job {job.job_id} was submitted, and nothing has begun here; {job.unknown}")
    return Verdict("unknown", "nothing has begun here")


def clock_time(moment: float, now: float) -> str:
    """``12:03``, with the date where that is hours away; in the time zone of this machine."""
    then = datetime.fromtimestamp(moment)
    return f"{then:%H:%M}" if abs(moment - now) < 12 * HOUR_S else f"{then:%Y-%m-%d %H:%M}"
