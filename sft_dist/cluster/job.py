"""What the training job's script calls: ``python -m sft_dist.cluster.job begin | end RUN_DIR``.

    job begin RUN_DIR                 notes that a start of the job begins. Exit code 0: train. Anything else: do not;
                                      99: the run is done and the script is to end with 0, else with that code
    job end RUN_DIR --code N          notes how it ended, decides what follows and does it; its exit code is the job's

Both run on the job's first node, outside of its steps and of its container: standard library only.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sft_dist.checkpoint.naming import newest_step
from sft_dist.cluster import nodes, slurm
from sft_dist.cluster.attempts import (
    DONE,
    GIVE_UP,
    LOST,
    REQUEUE,
    Attempt,
    note_begin,
    note_end,
    notes_folder,
    read_attempts,
)
from sft_dist.cluster.policy import Decision, JobNow, decide, fruitless_in_a_row, no_progress
from sft_dist.errors import ConfigError, MachineError, Preempted, SftError, Stalled
from sft_dist.runtime.slurm_step import own_job_id

# A job that was done, and that somebody put back into the queue.
NOTHING_TO_DO = 99

UNEXPECTED = 1

MAX_RESTARTS = 3  # the default of cluster.max_restarts

# A controller that is being restarted answers again within this time.
PATIENCE_S = 60.0
PAUSE_S = 3.0

Answer = TypeVar("Answer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the two commands and returns its exit code."""
    options = _parse(arguments)
    # A job that is requeued or cancelled gets SIGTERM; what is half done here is still to be finished.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = own_job_id()
    if job is None:
        print("error: this is no job of SLURM\n  fix: call it in the script of one", file=sys.stderr)
        return ConfigError.exit_code
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    try:
        if options.command == "begin":
            return begin(options.run, job, restart, max_restarts=options.max_restarts)
        return end(options.run, job, restart, code=options.code, max_restarts=options.max_restarts)
    except SftError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return options.code or error.exit_code


def begin(run: Path, job: str, restart: int, *, max_restarts: int) -> int:
    """Notes an attempt, after what is to be said of one that ended without a word.

    Returns:
        0: train; else what ``main`` says.

    Raises:
        ConfigError, MachineError: SLURM does not tell of its own job.
    """
    now = _patiently(lambda: _job(job))
    before = [attempt for attempt in read_attempts(run) if attempt.job == job]
    step = newest_step(run)
    before = [_lost(run, attempt, step) if attempt.is_open else attempt for attempt in before]
    if any(attempt.decision == DONE for attempt in before) and (run / "final").exists():
        _say(job, f"{run} is done: nothing to train")
        return NOTHING_TO_DO
    attempt = note_begin(run, job, restart, now.nodes, step=step)
    notes_folder(run, job, restart).mkdir(parents=True, exist_ok=True)
    where = f"start {len(before) + 1} of the job, on {', '.join(now.nodes)}"
    _say(job, f"{where}: {f'goes on from step {step:,}' if step else 'from the beginning'}")
    fruitless = fruitless_in_a_row(before, now=step)
    if fruitless > max_restarts:
        return _carry_out(run, attempt, Decision(GIVE_UP, no_progress(fruitless)), code=1, blamed={}, seen=before)
    bad = [name for name in nodes.blamed_enough(before) if name in now.nodes]
    if bad:
        decision = Decision(REQUEUE, f"{', '.join(bad)} failed this job {nodes.BLAMED_ENOUGH} times: without it")
        return _carry_out(run, attempt, decision, code=Preempted.exit_code, blamed={}, seen=before)
    return 0


def end(run: Path, job: str, restart: int, *, code: int, max_restarts: int) -> int:
    """Notes how an attempt ended, and does what follows from it.

    Args:
        code: of the step that failed; 0: all went well.

    Returns:
        The exit code of the job.

    Raises:
        ConfigError, MachineError: SLURM does not tell of its own job, or does not requeue it.
    """
    attempts = [attempt for attempt in read_attempts(run) if attempt.job == job]
    attempt = next((one for one in attempts if one.restart == restart), None)
    now = _patiently(lambda: _job(job))
    if attempt is None:
        attempt = note_begin(run, job, restart, now.nodes, step=newest_step(run))
        attempts.append(attempt)
    notes = notes_folder(run, job, restart)
    by_node = nodes.codes_by_node(notes, attempt.nodes)
    code = nodes.code_of_all(by_node, code)
    blamed = _blamed(run, attempt, notes, by_node, code, state=now.state)
    if code == 0 and blamed and not (run / "final").exists():
        code = UNEXPECTED  # srun may end with 0 where it has lost a node, and with it all word of the tasks there
    fruitless = fruitless_in_a_row(attempts, now=newest_step(run))
    state = JobNow(now.state, now.restarts, now.may_requeue, now.is_preempted)
    decision = decide(code, state, restart=restart, fruitless=fruitless, max_restarts=max_restarts)
    return _carry_out(run, attempt, decision, code=code, blamed=blamed, seen=attempts)


def _carry_out(
    run: Path, attempt: Attempt, decision: Decision, *, code: int, blamed: Mapping[str, str], seen: Sequence[Attempt]
) -> int:
    """Notes the decision before anything is done, as what is done may end this process."""
    step = newest_step(run)
    ended = note_end(
        run, attempt, code=code, step=step, decision=decision.what, reason=decision.reason, blamed=list(blamed)
    )  # fmt: skip
    why = "".join(f"; {name} {what}" for name, what in blamed.items())
    _say(attempt.job, f"{decision.what}, at step {step:,}: {decision.reason}{why}")
    if decision.what == REQUEUE:
        _patiently(lambda: slurm.requeue(attempt.job))
    # Where SLURM requeues the job itself, too: it may give it the same nodes.
    history = [one for one in seen if one.restart != ended.restart] + [ended]
    bad = nodes.blamed_enough(history)
    if bad and decision.what not in (DONE, GIVE_UP):
        _exclude(attempt.job, bad)
    return code


def _exclude(job: str, bad: Sequence[str]) -> None:
    """Lets a job that waits do without nodes; SLURM may say that too few are left, and then they stay."""
    state = _patiently(lambda: _job(job))
    both = sorted({*state.excluded, *bad})
    if both == sorted(state.excluded):
        return
    try:
        _patiently(lambda: slurm.exclude(job, both))
    except ConfigError as error:
        _say(job, f"{', '.join(bad)} failed {nodes.BLAMED_ENOUGH} times and cannot be left out: {error.what}")
    else:
        _say(job, f"without {', '.join(both)} from now on: failed {nodes.BLAMED_ENOUGH} times")


def _blamed(
    run: Path, attempt: Attempt, notes: Path, by_node: Mapping[str, int], code: int, *, state: str
) -> dict[str, str]:
    """Of an attempt that told of its end: the nodes that it failed on, with what each did."""
    found = nodes.failed_in_doctor(notes) if code == MachineError.exit_code else {}
    if code == Stalled.exit_code:
        found = nodes.stalled_node(run, attempt, attempt.nodes)
    states = _patiently(lambda: slurm.node_states(attempt.nodes))
    lost = nodes.lost_nodes(states, since=attempt.began)
    # A job that is being cancelled has processes ended by signals everywhere.
    return found or lost or (nodes.crashed_node(by_node) if state == "RUNNING" else {})


def _lost(run: Path, attempt: Attempt, step: int) -> Attempt:
    """Writes the end of an attempt that could not: its first node, where this would have run, was lost with it."""
    states = _patiently(lambda: slurm.node_states(attempt.nodes))
    lost = nodes.lost_nodes(states, since=attempt.began)
    reason = "; ".join(f"{name} {what}" for name, what in lost.items()) or "its script was ended"
    _say(attempt.job, f"start with restart count {attempt.restart} told of no end: {reason}")
    return note_end(run, attempt, code=None, step=step, decision=LOST, reason=reason, blamed=list(lost))


def _job(job: str) -> slurm.JobState:
    state = slurm.show_job(job)
    if state is None:
        raise MachineError(f"SLURM does not know job {job}, in which this runs", fix="see `scontrol show job`")
    return state


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Asks again while the controller does not answer; raises ``MachineError`` when it has not in ``PATIENCE_S``."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except MachineError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE_S)


def _say(job: str, text: str) -> None:
    print(f"job {job}: {text}", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sft_dist.cluster.job", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("run", type=Path, metavar="RUN_DIR")
        command.add_argument(
            "--max-restarts", type=int, default=MAX_RESTARTS, metavar="N",
            help="starts that got no further than the last checkpoint, before the job gives up (default: %(default)s)",
        )  # fmt: skip
    commands.choices["end"].add_argument("--code", type=int, required=True, metavar="N", help="exit code of the steps")
    parser.set_defaults(code=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
